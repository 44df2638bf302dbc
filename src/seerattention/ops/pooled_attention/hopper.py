"""Hopper GPUs: the block-sparse kernel, told to read every block, also writes the map of its 64 x 64 tiles.

Rows' largest scores per tile are what its softmax needs anyway; each consumer keeps them in a scratch of its
own until the rows' sums are known. Larger blocks pool the map of the tiles again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.block_sparse_attention import hopper
from seerattention.ops.options import PoolOptions
from seerattention.rows import num_blocks

#: Both consumers read one ring of keys and values where a query block has 128 tokens.
BLOCK = (128, 128)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
) -> list[str]:
    """Return the reasons why this backend cannot run."""
    if v is None:
        return ["it computes the output, for which it needs v"]
    if options.pool != "max":
        return [f"it keeps the largest weights of blocks, not their {options.pool}"]
    return hopper.why_not(q, k, v, block_size, options)


def run(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the output, the row-normalised map of blocks, and lse (None unless asked)."""
    assert v is not None
    tiles = (num_blocks(x.shape[2], hopper.TILE) for x in (q, k))
    target = torch.zeros(*q.shape[:2], *tiles, dtype=torch.float32, device=q.device)
    rows, columns = num_blocks(q.shape[2], BLOCK[0]), num_blocks(k.shape[2], BLOCK[1])
    every = torch.full((1, 1, rows, num_blocks(columns, 32)), -1, dtype=torch.int32, device=q.device)
    out, lse = hopper.start(q, k, v, every, BLOCK, options, target)
    if options.per_kv_head:
        target = target.unflatten(1, (k.shape[1], -1)).amax(2)
    pool = (block_size[0] // hopper.TILE, block_size[1] // hopper.TILE)
    if pool != (1, 1):
        target = F.max_pool2d(target, pool, ceil_mode=True)
    return out, target.div_(target.sum(-1, keepdim=True)), lse if options.return_lse else None
