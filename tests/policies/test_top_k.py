from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seerattention import TopK, causal_blocks
from seerattention.policies import Rule, select
from seerattention.rows import Rows


def check_best_blocks(
    choose: Callable[[Tensor, Tensor, Tensor, int], Tensor], scores: Tensor, always: Tensor, count: int
) -> None:
    """Compare with a sort of each row: what is read anyway, then by score, then by number."""
    valid = torch.ones(scores.shape[2:], dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])
    always = always & valid
    actual = (choose(scores, valid, always, count) | always) & valid
    for row, choice in zip(scores.flatten(0, 1), actual.flatten(0, 1), strict=True):
        for i in range(scores.shape[2]):
            numbers = [j for j in range(scores.shape[3]) if valid[i, j]]
            forced = sum(int(always[i, j]) for j in numbers)
            best = sorted(numbers, key=lambda j: (not always[i, j], -float(row[i, j]), j))
            assert choice[i].nonzero()[:, 0].tolist() == sorted(best[: max(count, forced)])


def lower_block(scores: Tensor, valid: Tensor, always: Tensor, count: int) -> Tensor:
    return Rule("count", count).choose(scores, valid, always)


def higher_block(scores: Tensor, valid: Tensor, always: Tensor, count: int) -> Tensor:
    return Rule("count", count).choose(scores.flip(-1), valid.flip(-1), always.flip(-1)).flip(-1)


@given(
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.integers(0, 2**31),
)
def test_best_blocks_with_many_ties(
    nq: int, past: int, count: int, levels: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (2, 2, nq, nq + past), generator=generator).float()
    scores[scores == 0] = -math.inf if levels > 2 else 0.0
    scores[scores == 3] = math.inf
    always = torch.rand(nq, nq + past, generator=generator) < share
    check_best_blocks(lower_block, scores, always, count)


def test_ties_to_the_higher_block_are_noticed() -> None:
    none = torch.zeros(8, 8, dtype=torch.bool)
    check_best_blocks(higher_block, torch.randn(1, 1, 8, 8), none, 3)
    with pytest.raises(AssertionError):
        check_best_blocks(higher_block, torch.zeros(1, 1, 8, 8), none, 3)


@pytest.mark.parametrize(
    ("density", "blocks", "expected"),
    [(0.1, 512, 26), (0.1, 16, 1), (0.5, 128, 37), (1.0, 7, 7), (0.75, 10, 5)],
)
def test_number_of_blocks(density: float, blocks: int, expected: int) -> None:
    assert TopK(density).blocks(blocks) == expected


@pytest.mark.parametrize("n", [1, 2, 16, 77, 256])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5, 1.0])
def test_the_published_formula_is_exact(density: float, n: int) -> None:
    """The published code: k of n blocks, and the last two rows dense on top."""
    k = max(1, math.floor((1 - math.sqrt(1 - density)) * n))
    scores, valid = torch.randn(1, 2, n, n), causal_blocks(n, n, (1, 1))
    plain, published = (
        select(TopK(density, dense_last_rows=rows), scores, rows=Rows.last(n, n), block_size=(1, 1))
        for rows in (0, 2)
    )
    seen = torch.arange(1, n + 1, dtype=torch.int32)
    assert torch.equal(plain.counts, seen.clamp(max=k).expand(1, 2, n))
    assert plain.density(valid) == pytest.approx(k * (2 * n - k + 1) / (n * (n + 1)), rel=1e-12)
    assert density - 2 / n <= plain.density(valid) <= max(density, 2 / (n + 1))
    assert torch.equal(published.counts[..., -2:], seen[-2:].expand_as(published.counts[..., -2:]))
    assert torch.equal(published.to_mask()[:, :, :-2], plain.to_mask()[:, :, :-2])
