from __future__ import annotations

import torch

from seerattention import BlockSelection
from seerattention.testing.poison import poison, unread_tokens

# One query block of two tokens at the end of seven, blocks of two tokens: 0 1 | 2 3 | 4 5 | 6.
PER_HEAD = BlockSelection.from_mask(
    torch.tensor([[[[1, 0, 0, 1]], [[0, 0, 1, 1]], [[0, 0, 0, 1]], [[0, 0, 0, 1]]]]).bool(), (2, 2)
)


def numbers(x: torch.Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in x[0]]


def test_unread_by_every_head_of_a_group() -> None:
    assert numbers(unread_tokens(PER_HEAD, 2, 7)) == [[2, 3], [0, 1, 2, 3, 4, 5]]


def test_unread_per_query_head() -> None:
    early = [0, 1, 2, 3, 4, 5]
    assert numbers(unread_tokens(PER_HEAD, 4, 7)) == [[2, 3, 4, 5], [0, 1, 2, 3], early, early]


def test_one_selection_for_all_heads() -> None:
    shared = BlockSelection.from_mask(PER_HEAD.to_mask()[:, :1], (2, 2))
    assert numbers(unread_tokens(shared, 2, 7)) == [[2, 3, 4, 5]] * 2


def test_poison_fills_what_is_unread_and_copies() -> None:
    k, v = torch.ones(1, 2, 7, 3), torch.ones(1, 2, 7, 3)
    for poisoned in poison(k, v, PER_HEAD):
        assert torch.equal(poisoned.isnan().all(-1), unread_tokens(PER_HEAD, 2, 7))
        assert torch.equal(poisoned.isnan().any(-1), unread_tokens(PER_HEAD, 2, 7))
    assert not k.isnan().any()
    assert not v.isnan().any()
