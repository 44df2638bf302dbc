"""Scores by the CPU's kernel, compiled for every kind of CPU that this one can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seerattention.ops.cases.score_blocks import CASES, Case, packed
from seerattention.ops.native import choosing
from seerattention.ops.score_blocks import score_blocks
from seerattention.testing.budget import Budget

SMALL = [case for case in CASES if not case.large]
by_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@by_case
def test_exact_products_give_exact_scores(level: str, case: Case) -> None:
    q, k, _ = case.whole()
    for scale in (0.5, -0.25):
        mine, wanted = (
            score_blocks(q, k, case.sub_blocks, scale=scale, **case.geometry, backend=backend)
            for backend in ("native", "reference")
        )
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shares", [False, True])
@by_case
def test_within_the_error_budget(level: str, case: Case, shares: bool, dtype: torch.dtype) -> None:
    q, k, _ = case.normal(dtype)
    options = {"scale": 0.5, "shares": shares, **case.geometry}

    def reference(q: Tensor, k: Tensor) -> Tensor:
        return score_blocks(q, k, case.sub_blocks, **options, backend="reference")

    Budget.of(reference, q, k).check(score_blocks(q, k, case.sub_blocks, **options, backend="native"))


def test_packed_sequences_are_those_alone(level: str) -> None:
    rows, options, q, k = packed()
    scores = score_blocks(q, k, rows=rows, **options, shares=True, backend="native")
    for one, (down, across) in rows.maps(options["block_size"]):
        own_q = q[:, :, rows.places(rows.num_queries, 4)[one.index]]
        own_k = k[one.index, None, :, : -(-one.rows.num_keys // 8)]
        alone = score_blocks(own_q, own_k, rows=one.rows, **options, shares=True, backend="native")
        assert torch.equal(scores[:, :, down, across], alone)


def test_gradients_are_left_to_others(level: str) -> None:
    q, k, _ = SMALL[3].whole()
    leaf = q.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="it has no backward"):
        score_blocks(leaf, k, (8, 8), backend="native")
    assert score_blocks(leaf, k, (8, 8)).requires_grad
    with torch.no_grad():
        score_blocks(leaf, k, (8, 8), backend="native")


def test_a_wrong_scale_is_noticed(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = choosing.choose

    def wrong(*told: object) -> None:
        *given, scale = told
        run(*given, 1.01 * scale)  # type: ignore[arg-type, operator]

    monkeypatch.setattr(choosing, "choose", wrong)
    for shares in (False, True):
        with pytest.raises(AssertionError):
            test_within_the_error_budget(level, SMALL[3], shares, torch.float32)
