"""The specification: dense attention under the selection's mask. Differentiable, never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.selection import BlockSelection


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> list[str]:
    """Return the reasons why this backend cannot run; it runs everything."""
    return []


def token_mask(selection: BlockSelection, num_heads: int, num_queries: int, num_keys: int) -> Tensor:
    """Expand a selection to the tokens a query may see, bool ``[B, num_heads, Tq, Tk]``."""
    block_q, block_k = selection.block_size
    blocks = selection.to_mask().repeat_interleave(num_heads // selection.shape[1], dim=1)
    tokens = blocks.repeat_interleave(block_q, 2)[:, :, :num_queries]
    tokens = tokens.repeat_interleave(block_k, 3)[..., :num_keys]
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=tokens.device)
    return tokens & causal.tril(num_keys - num_queries)


def run(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float) -> Tensor:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``."""
    groups = q.shape[1] // k.shape[1]
    mask = token_mask(selection, q.shape[1], q.shape[2], k.shape[2]).expand(q.shape[0], -1, -1, -1)
    scores = (q * scale) @ k.repeat_interleave(groups, 1).mT
    share = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    # 0 * nan is nan: zero the values that no query of the head reads.
    read = mask.any(2)[..., None]
    return share @ v.repeat_interleave(groups, 1).masked_fill(~read, 0)
