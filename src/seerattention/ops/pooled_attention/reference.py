"""The specification: the whole softmax map, pooled. Memory grows with the square of the length.

A gate that chooses for a group of query heads learns the map of the group: the largest weight that any head
of the group gives to anything in a block pair, or the largest sum of weights that any of its queries gives to
a block. Rows are divided by their sums after that, once. For decode gates (query blocks of one token) the
largest weight is the published target (SeerAttention-R, section 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.attention_scores import by_block
from seerattention.ops.block_sparse_attention.reference import shares
from seerattention.ops.dispatch import runs_everything
from seerattention.ops.options import PoolOptions

unsupported = runs_everything


def run(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the output (None without v), the row-normalised map of blocks, and lse (None unless asked)."""
    columns = options.map_shape(q, k, block_size)[3]
    outs, maps, lses = [], [], []
    for one in options.rows.sequences():
        values = None if v is None else v[:, :, one.keys]
        mask = one.rows.causal((1, 1), q.device)
        out, pooled, lse = _attend(q[:, :, one.queries], k[:, :, one.keys], values, block_size, mask, options)
        outs.append(out)
        maps.append(F.pad(pooled, (0, columns - pooled.shape[3])))
        lses.append(lse)
    return (
        None if v is None else torch.cat(outs, 2),
        torch.cat(maps, 2),
        torch.cat(lses, 2) if options.return_lse else None,
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], mask: Tensor, options: PoolOptions
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return output, map and lse of sequences of one length."""
    groups = q.shape[1] // k.shape[1]
    share, lse = shares(q, k.repeat_interleave(groups, 1), mask, options)
    pooled = options.merged(by_block(share.to(lse.dtype), block_size[1]), -1)
    pooled = by_block(pooled, block_size[0], -2).amax(-2)
    if options.per_kv_head:
        pooled = pooled.unflatten(1, (k.shape[1], groups)).amax(2)
    out = None if v is None else share @ v.repeat_interleave(groups, 1)
    return out, (pooled / pooled.sum(-1, keepdim=True)).float(), lse
