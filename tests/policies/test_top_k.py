from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seerattention import TopK, causal_blocks
from seerattention.policies import select
from seerattention.policies.base import top_blocks
from seerattention.rows import Rows


def check_top_blocks(top: Callable[[Tensor, Tensor, int], Tensor], scores: Tensor, count: int) -> None:
    """Compare with a sort of each row by score, then by number."""
    valid = torch.ones(scores.shape[2:], dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])
    actual = top(scores, valid, count)
    for row, choice in zip(scores.flatten(0, 1), actual.flatten(0, 1), strict=True):
        for i in range(scores.shape[2]):
            numbers = [j for j in range(scores.shape[3]) if valid[i, j]]
            best = sorted(numbers, key=lambda j: (-float(row[i, j]), j))[:count]
            assert choice[i].nonzero()[:, 0].tolist() == sorted(best)


@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
def test_best_blocks_with_many_ties(nq: int, past: int, count: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (2, 2, nq, nq + past), generator=generator).float()
    scores[scores == 0] = -math.inf if levels > 2 else 0.0
    check_top_blocks(top_blocks, scores, count)


def ties_to_the_higher_block(scores: Tensor, valid: Tensor, count: int) -> Tensor:
    return top_blocks(scores.flip(-1), valid.flip(-1), count).flip(-1)


def test_ties_to_the_higher_block_are_noticed() -> None:
    distinct = torch.randn(1, 1, 8, 8)
    check_top_blocks(ties_to_the_higher_block, distinct, 3)
    with pytest.raises(AssertionError):
        check_top_blocks(ties_to_the_higher_block, torch.zeros(1, 1, 8, 8), 3)


@pytest.mark.parametrize(
    ("density", "blocks", "expected"),
    [(0.1, 512, 26), (0.1, 16, 1), (0.5, 128, 37), (1.0, 7, 7), (0.75, 10, 5)],
)
def test_number_of_blocks(density: float, blocks: int, expected: int) -> None:
    assert TopK(density).blocks(blocks) == expected


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5, 1.0])
def test_density_is_what_was_asked_for(density: float) -> None:
    nq = 256
    scores = torch.randn(1, 2, nq, nq)
    # With the own block first among the scores, nothing comes on top of the k best.
    scores += 100 * torch.eye(nq)
    selection = select(TopK(density), scores, rows=Rows.last(nq, nq), block_size=(1, 1))
    actual = selection.density(causal_blocks(nq, nq, (1, 1)))
    assert density - 2 / nq <= actual <= density
