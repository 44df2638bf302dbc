"""Seeded inputs: queries, keys, values and random selections."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.selection import BlockSelection, causal_blocks, own_blocks


def make_qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normal q ``[B, Hq, Tq, D]`` and k, v ``[B, Hk, Tk, D]``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(h: int, t: int) -> Tensor:
        return torch.randn(batch, h, t, head_dim, generator=generator).to(device, dtype)

    return normal(heads, num_queries), normal(kv_heads, num_keys), normal(kv_heads, num_keys)


def random_selection(
    batch: int,
    heads: int,
    num_queries: int,
    num_keys: int,
    block_size: tuple[int, int],
    *,
    density: float,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockSelection:
    """Return a selection of random causal blocks and every row's own ones.

    Args:
        batch: Batch of the selection.
        heads: Heads of the selection: 1, ``Hk`` or ``Hq``.
        num_queries: Query tokens, the last of ``num_keys``.
        num_keys: Key tokens.
        block_size: Tokens per (query block, KV block).
        density: Probability of a block that is not the row's own.
        device: Where to build it.
        seed: Of the random blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    valid = causal_blocks(num_queries, num_keys, block_size)
    own = own_blocks(num_queries, num_keys, block_size)
    drawn = torch.rand(batch, heads, *valid.shape, generator=generator) < density
    return BlockSelection.from_mask(((drawn | own) & valid).to(device), block_size)
