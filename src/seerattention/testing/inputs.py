"""Seeded inputs: queries, keys, values and selections."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.shapes import Shape
from seerattention.rows import Rows, num_blocks
from seerattention.selection import BlockSelection


def random_qkv(
    shape: Shape, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw normal queries, keys and values.

    Args:
        shape: The sizes.
        dtype: Of the result; the numbers are the same ones, rounded.
        device: Of the result; the numbers do not depend on it.
        seed: Of the random numbers.

    Returns:
        q ``[B, Hq, Tq, D]``, k and v ``[B, Hk, Tk, D]``.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int) -> Tensor:
        x = torch.randn(shape.batch, heads, tokens, shape.head_dim, generator=generator)
        return x.to(device, dtype)

    return (
        draw(shape.heads, shape.queries),
        draw(shape.kv_heads, shape.keys),
        draw(shape.kv_heads, shape.keys),
    )


def random_selection(
    shape: Shape,
    *,
    density: float,
    heads: int | None = None,
    batch: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> BlockSelection:
    """Draw a selection: a query block's own blocks, and each earlier block with a given probability.

    Args:
        shape: The sizes.
        density: Probability of an earlier block, in [0, 1].
        heads: Heads of the selection; default ``Hq``.
        batch: Batch of the selection; default ``B``.
        device: Of the result; the selection does not depend on it.
        seed: Of the random numbers.

    Returns:
        The selection, ``[batch, heads, Nq, Nk]``.
    """
    if shape.lengths:
        return _random_packed(shape, density, heads or shape.heads, device, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = Rows.last(shape.queries, shape.keys)
    valid, own = rows.causal(shape.block_size), rows.own(shape.block_size)
    draws = torch.rand(batch or shape.batch, heads or shape.heads, *valid.shape, generator=generator)
    return BlockSelection.from_mask((((draws < density) & valid) | own).to(device), shape.block_size)


def _random_packed(shape: Shape, density: float, heads: int, device: str, seed: int) -> BlockSelection:
    """Draw one selection per packed sequence and lay their rows behind one another."""
    longest = num_blocks(max(keys for _, keys in shape.lengths), shape.block_size[1])
    masks = []
    for i, (queries, keys) in enumerate(shape.lengths):
        if queries:
            one = replace(shape, queries=queries, keys=keys, lengths=())
            mask = random_selection(one, density=density, heads=heads, batch=1, seed=seed + i).to_mask()
            masks.append(F.pad(mask, (0, longest - mask.shape[3])))
    return BlockSelection.from_mask(torch.cat(masks, 2).to(device), shape.block_size)
