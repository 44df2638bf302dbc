from __future__ import annotations

import pytest
import torch

from seerattention import TokenBudget
from seerattention.policies import select
from seerattention.rows import Rows


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(1, 1), (63, 1), (64, 1), (127, 1), (128, 2), (300, 4), (10**6, 8)]
)
def test_whole_blocks_in_every_row(tokens: int, blocks: int) -> None:
    scores = torch.randn(2, 3, 8, 8)
    selection = select(TokenBudget(tokens), scores, rows=Rows.last(512, 512), block_size=(64, 64))
    expected = torch.arange(1, 9).clamp(max=blocks).int()
    assert torch.equal(selection.counts, expected.expand(2, 3, 8))


def test_the_best_blocks() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 0.0]).expand(1, 1, 4, 4)
    mask = TokenBudget(32).choose(scores, torch.ones(4, 4, dtype=torch.bool).tril(), 16)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
