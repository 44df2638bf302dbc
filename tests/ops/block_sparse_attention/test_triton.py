"""What can be said of the Triton backend without running it; `interpreted_triton.py` runs it."""

from __future__ import annotations

import pytest
import torch

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention.triton import BLOCKS_K, LAUNCHES, launch_of
from seerattention.rows import Rows


def test_a_cpu_is_refused() -> None:
    q = torch.zeros(1, 1, 64, 64)
    full = BlockSelection.full(Rows.last(64, 64), (64, 64))
    with pytest.raises(NotImplementedError, match="triton: it needs a GPU"):
        block_sparse_attention(q, q, q, full, backend="triton")


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_q", [1, 16, 32, 48, 64, 128, 256])
def test_launches_fit_the_blocks(head_dim: int, block_q: int) -> None:
    for itemsize in (2, 4):
        for block_k in BLOCKS_K:
            launch = launch_of(head_dim, (block_q, block_k), itemsize)
            assert block_k % launch.block_n == 0
            assert 16 <= launch.block_m <= max(16, 2 * block_q)
            assert launch.block_m & (launch.block_m - 1) == 0
    assert all(a.block_m < b.block_m for a, b in (x for x in LAUNCHES.values() if len(x) == 2))
