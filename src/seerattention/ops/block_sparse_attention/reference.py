"""The specification: dense attention under the selection's mask. Differentiable, never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.dispatch import runs_everything
from seerattention.ops.options import Options
from seerattention.ops.pages import laid_out
from seerattention.rows import OneSequence, Rows, num_blocks
from seerattention.selection import BlockSelection

unsupported = runs_everything


def token_mask(selection: BlockSelection, num_heads: int, rows: Rows) -> Tensor:
    """Expand a selection of one sequence to the tokens a query may see, bool ``[B, num_heads, Tq, Tk]``."""
    block_q, block_k = selection.block_size
    blocks = selection.to_mask().repeat_interleave(num_heads // selection.shape[1], dim=1)
    tokens = blocks.repeat_interleave(block_q, 2)[:, :, : rows.num_queries]
    tokens = tokens.repeat_interleave(block_k, 3)[..., : rows.num_keys]
    return tokens & rows.causal((1, 1), tokens.device)


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    outs, lses, row = [], [], 0
    for one in options.rows.sequences():
        rows = num_blocks(one.rows.num_queries, selection.block_size[0])
        chosen = selection.row_slice(row, row + rows)
        mask = token_mask(chosen, q.shape[1], one.rows).expand(q.shape[0], -1, -1, -1)
        keys, values = (_keys_of(x, one, options) for x in (k, v))
        out, lse = _attend(q[:, :, one.queries], keys, values, mask, options)
        outs.append(out)
        lses.append(lse)
        row += rows
    return torch.cat(outs, 2), torch.cat(lses, 2) if options.return_lse else None


def _keys_of(x: Tensor, one: OneSequence, options: Options) -> Tensor:
    """Return the keys or values of a sequence, of a batch those of all, ``[B, Hk, Tk, D]``."""
    if options.pages is None:
        return x[:, :, one.keys]
    own = options.pages[one.index : one.index + 1] if options.packed else options.pages
    return laid_out(x, own, one.rows.num_keys)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output and the logarithm of the softmax's denominator of sequences of one length."""
    # 0 * nan is nan, also in gradients: zero the keys and values that no query of the head reads.
    unread = ~mask.any(2)[..., None]
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).masked_fill(unread, 0) for x in (k, v))
    share, lse = shares(q, keys, mask, options)
    return share @ values, lse


def shares(q: Tensor, k: Tensor, mask: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return the softmax map ``[B, Hq, Tq, Tk]`` and its denominators' logarithms; k has Hq heads here."""
    scores = (q * options.scale) @ k.mT
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    return torch.softmax(scores, dim=-1)[..., : k.shape[2]], lse
