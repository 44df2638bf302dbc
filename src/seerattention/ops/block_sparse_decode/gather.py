"""Pure PyTorch on any device: gather what every token selected and multiply it batched.

A sequence at a time, so that what was gathered stays near; nothing else of the cache is touched. A GPU is
waited for once a sequence, to learn how much there is to gather.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.options import DecodeOptions
from seerattention.ops.pages import take
from seerattention.selection import BlockSelection


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: DecodeOptions
) -> list[str]:
    """Return the reasons why this backend cannot run."""
    return []


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: DecodeOptions
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    mask, block = selection.to_mask(), selection.block_size[1]
    lists = q.shape[1] if mask.shape[1] == q.shape[1] else k.shape[1]
    mask = mask.repeat_interleave(lists // mask.shape[1], 1)
    tokens = torch.arange(q.shape[2], device=q.device) - q.shape[2]
    kv_heads = torch.arange(lists, device=q.device)[:, None, None] // (lists // k.shape[1])
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    held, starts = options.held(len(q)), options.first_keys(len(q))
    for b, (start, length) in enumerate(zip(starts, held, strict=True)):
        positions = tokens + length
        keys, hidden = _keys_of(mask[b % len(mask)], positions, block)
        pages, place = b, keys + start
        if options.pages is not None:
            pages = options.pages[b].long()[keys // options.page_tokens].clamp(0, len(k) - 1)
            place = keys % options.page_tokens
        key, value = (take(x, pages, kv_heads, place) for x in (k, v))
        # [lists, Tq, group, D] and [lists, Tq, keys, D].
        scores = (q[b] * options.scale).unflatten(0, (lists, -1)).transpose(1, 2) @ key.mT
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        scores = scores.masked_fill(hidden[:, :, None], -torch.inf)
        if options.sinks is not None:
            sinks = options.sinks.to(scores.dtype).view(lists, 1, -1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], -1)
        share = scores.softmax(-1)[..., : keys.shape[-1]]
        # A sum per block and then their sum: in one chain of all keys the rounding errors would add up.
        by_block = share.unflatten(-1, (-1, block)).transpose(2, 3)
        attended = (by_block @ value.unflatten(2, (-1, block))).sum(2)
        attended = attended.masked_fill(hidden.all(-1)[..., None, None], 0)
        out[b] = attended.transpose(1, 2).flatten(0, 1)
        if options.return_lse:
            lse[b] = scores.to(lse.dtype).logsumexp(-1).transpose(1, 2).flatten(0, 1)
    return out, lse if options.return_lse else None


def _keys_of(mask: Tensor, positions: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return positions of the keys that each token reads, int64 ``[lists, Tq, n]``, and which of them not to.

    Up to the longest list's length, others end with their first key again and again.
    """
    seen = torch.arange(mask.shape[2], device=mask.device) * block <= positions[:, None]
    mask = mask & seen
    counts = mask.sum(-1)
    most = max(1, int(counts.max()))
    blocks = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    keys = (blocks[..., None] * block + torch.arange(block, device=mask.device)).flatten(-2)
    rank = torch.arange(most, device=mask.device).repeat_interleave(block)
    hidden = (rank >= counts[..., None]) | (keys > positions[:, None])
    return torch.where(hidden, keys[..., :1], keys), hidden
