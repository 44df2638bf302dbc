"""Where a budget cuts a row: shared by the objectives that look at one."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.policies import TopK


def cut(values: Tensor, free: Tensor, density: float) -> Tensor | None:
    """Return the value halfway between the last free block that ``TopK(density)`` takes and the next.

    Args:
        values: fp32 ``[B, H, R, N]``, scores or target.
        free: bool ``[R, N]``, the blocks to choose from.
        density: Fraction of the causally valid blocks.

    Returns:
        fp32 ``[B, H, R, 1]``, differentiable; -inf in rows whose free blocks are all taken, None where
        that is every row.
    """
    count = TopK(density).blocks(values.shape[-1])
    if count + 1 > values.shape[-1]:
        return None
    best = values.masked_fill(~free, float("-inf")).topk(count + 1, dim=-1, sorted=True).values
    return best[..., -2:].mean(-1, keepdim=True)


def decided(free: Tensor, density: float) -> Tensor:
    """Mark the rows with more free blocks than ``TopK(density)`` takes, bool ``[R, 1]``."""
    return free.sum(-1, keepdim=True) > TopK(density).blocks(free.shape[-1])


def masked_mean(values: Tensor, rows: Tensor) -> Tensor:
    """Mean over the rows ``[R, 1]`` marked of the sums of ``values`` ``[B, H, R, N]`` over blocks."""
    return (torch.where(rows, values, 0).sum(-1)).mean() * (rows.numel() / rows.sum().clamp(min=1))
