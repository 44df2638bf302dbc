from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seerattention import TopP


@given(st.integers(1, 9), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_smallest_cover(blocks: int, mass: float, seed: int) -> None:
    scores = 2 * torch.randn(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    mask = TopP(mass).choose(scores, valid, 64) & valid
    for h in range(2):
        for i in range(blocks):
            weights = scores[0, h, i, : i + 1].double().exp()
            share = weights / weights.sum()
            chosen = mask[0, h, i, : i + 1]
            # Rounding of shares in fp32 may move the border by as much.
            slack = 8 * blocks * torch.finfo(torch.float32).eps
            assert float(share[chosen].sum()) >= mass - slack
            assert float(share[chosen].sum() - share[chosen].min()) < mass + slack
            if not chosen.all():
                assert float(share[chosen].min()) >= float(share[~chosen].max()) - slack


def test_ties_to_the_lower_block() -> None:
    valid = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = TopP(0.5).choose(torch.zeros(1, 1, 4, 4), valid, 64) & valid
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(("mass", "expected"), [(0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)])
def test_border(mass: float, expected: int) -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 1, 4, 4)
    valid = torch.ones(4, 4, dtype=torch.bool).tril()
    assert int(TopP(mass).choose(scores, valid, 64)[0, 0, 3].sum()) == expected
