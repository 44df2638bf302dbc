from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from seerattention import Threshold, causal_blocks
from seerattention.policies import select
from seerattention.rows import Rows


@given(st.lists(st.floats(0, 0.999), min_size=2, max_size=6), st.integers(0, 2**31))
def test_density_falls_as_the_threshold_rises(values: list[float], seed: int) -> None:
    scores = 4 * torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    valid = causal_blocks(512, 512, (64, 64))
    chosen = [
        select(Threshold(value), scores, rows=Rows.last(512, 512), block_size=(64, 64))
        for value in sorted(values)
    ]
    densities = [selection.density(valid) for selection in chosen]
    assert densities == sorted(densities, reverse=True)
    for more, fewer in pairwise(chosen):
        assert not (fewer.to_mask() & ~more.to_mask()).any()


def test_share_of_the_row_counts() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 1, 4, 4)
    mask = select(Threshold(0.16), scores, rows=Rows.last(4, 4), block_size=(1, 1)).to_mask()
    # The last row's shares are as written; earlier rows divide by less, row 1 by 0.8 and row 2 by 0.95.
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    mask = select(Threshold(0.53), scores, rows=Rows.last(4, 4), block_size=(1, 1)).to_mask()
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_zero_takes_everything() -> None:
    mask = select(Threshold(0), torch.randn(1, 1, 6, 6), rows=Rows.last(6, 6), block_size=(1, 1)).to_mask()
    assert torch.equal(mask[0, 0], torch.ones(6, 6, dtype=torch.bool).tril())


def test_border() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 1, 4, 4)
    valid = torch.ones(4, 4, dtype=torch.bool).tril()
    for share, count in ((0.5, 1), (0.3, 2), (0.15, 3), (0.05, 4)):
        below, above = Threshold(share * (1 - 1e-6)), Threshold(share * (1 + 1e-6))
        assert int(below.choose(scores, valid, 64)[0, 0, 3].sum()) == count
        assert int(above.choose(scores, valid, 64)[0, 0, 3].sum()) == count - 1
    # A share equal to the threshold is not above it.
    halves = torch.zeros(1, 1, 2, 2)
    assert not Threshold(0.5).choose(halves, valid[:2, :2], 64)[0, 0, 1].any()
