from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from seerattention.ops import language
from seerattention.ops.cases.score_blocks import CASES, Case
from seerattention.ops.launch import Launch
from seerattention.ops.score_blocks import BACKENDS, score_blocks
from seerattention.testing.budget import Budget
from seerattention.testing.packed import check_packed_scores

pytest.importorskip("triton")

SMALL = [case for case in CASES if not case.large]
by_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in SMALL}
#: What whole numbers do not show is rounding: of one size of sub-blocks, of two, of none, in groups or not.
ROUNDED = ("one-short-block", "no-sub-blocks", "uneven", "no-groups", "later-rows", "not-a-power-of-two")
kernel = BACKENDS["triton"]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles, of different sizes, at the sizes that an interpreter computes."""
    small = {"score": Launch(16, 16, 4, 1, resident=2), "back": Launch(16, 32, 4, 1)}
    monkeypatch.setattr(kernel, "LAUNCHES", {"narrow": small, "wide": small})
    return


def run(
    case: Case, backend: str, q: Tensor, k: Tensor, gradient: Tensor, *, shares: bool = False
) -> tuple[Tensor, ...]:
    q, k = (x.detach().requires_grad_() for x in (q, k))
    options = {"scale": 0.5, "shares": shares, "backend": backend, **case.geometry}
    scores = score_blocks(q, k, case.sub_blocks, **options)
    return scores.detach(), *torch.autograd.grad(scores, (q, k), gradient.to(scores.dtype))


@by_case
def test_exact_products_give_exact_results(case: Case) -> None:
    """Ties included: which of equal pairs gets the gradient is part of the specification."""
    given = case.whole()
    for mine, wanted in zip(run(case, "triton", *given), run(case, "reference", *given), strict=True):
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(BY_NAME[name], torch.float16) for name in ROUNDED] + [(BY_NAME["uneven"], torch.float32)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    q, k, gradient = case.normal(dtype)
    assert (gradient != 0).float().mean() > 0.9
    for place, mine in enumerate(run(case, "triton", q, k, gradient)):

        def reference(q: Tensor, k: Tensor, i: int = place) -> Tensor:
            return run(case, "reference", q, k, gradient)[i]

        Budget.of(reference, q, k).check(mine)


def test_packed_sequences_are_those_alone() -> None:
    check_packed_scores("triton")


@pytest.mark.parametrize(
    ("name", "dtype", "slices"),
    [(name, torch.float16, 2**28) for name in ("one-summary", *ROUNDED, "every-pair", "four")]
    + [("uneven", torch.float16, 20_000), ("later-rows", torch.float32, 5000)],
    ids=str,
)
def test_shares_within_the_error_budget(
    name: str, dtype: torch.dtype, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and in slices."""
    monkeypatch.setattr(kernel, "SLICE_BYTES", slices)
    case = BY_NAME[name]
    q, k, gradient = case.normal(dtype)
    for place, mine in enumerate(run(case, "triton", q, k, gradient, shares=True)):

        def reference(q: Tensor, k: Tensor, i: int = place) -> Tensor:
            return run(case, "reference", q, k, gradient, shares=True)[i]

        Budget.of(reference, q, k).check(mine)


def test_gradients_below_the_range_of_fp16() -> None:
    case = BY_NAME["no-groups"]
    q, k, gradient = case.normal(torch.float16)
    gradient *= 2.0**-20
    # The same without the small numbers.
    small = run(case, "triton", q.float() * 1024, k.float() * 1024, gradient)
    mine = run(case, "triton", q, k, gradient)
    assert mine[1].any()
    for a, b in zip(mine[1:], small[1:], strict=True):
        # fp16's smallest number, and the rounding of what the larger inputs show.
        assert (a.float() - b / 1024).abs().max() <= 2.0**-24 + 2.0**-10 * (b / 1024).abs().max()


def test_nothing_reaches_acausal_blocks() -> None:
    case = BY_NAME["later-rows"]
    q, k, _ = case.normal()
    scores = score_blocks(q, k, case.sub_blocks, **case.geometry, backend="triton")
    later = ~case.geometry["rows"].causal(case.geometry["block_size"])
    assert later.any()
    assert not scores[..., later].any()
    assert scores[..., ~later].all()


def test_without_gradients_the_same_scores() -> None:
    case = BY_NAME["no-groups"]
    q, k, gradient = case.normal()
    with torch.no_grad():
        scores = score_blocks(q, k, case.sub_blocks, scale=0.5, **case.geometry, backend="triton")
    assert torch.equal(scores, run(case, "triton", q, k, gradient)[0])


def test_one_side_alone_learns() -> None:
    case = BY_NAME["no-groups"]
    q, k, gradient = case.normal()
    both = run(case, "triton", q, k, gradient)[1:]
    for place in range(2):
        given = [q.clone(), k.clone()]
        given[place].requires_grad_()
        score_blocks(*given, case.sub_blocks, scale=0.5, **case.geometry, backend="triton").backward(gradient)
        assert torch.equal(given[place].grad, both[place])
        assert given[1 - place].grad is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "it computes float16, bfloat16 and float32, not float64"),
        ({"dtype": torch.bfloat16}, "wrongly"),
        ({"dim": 129}, "up to 512 bytes"),
        ({"scale": -1.0}, "the scale must be positive, not -1.0"),
        ({"sub_blocks": (256, 256)}, "up to 32768 pairs"),
    ],
)
def test_reasons_why_not(change: dict, reason: str) -> None:
    given = {"dtype": torch.float32, "dim": 16, "scale": 1.0, "sub_blocks": (2, 2)} | change
    x = torch.randn(1, 1, 8, given["dim"]).to(given["dtype"])
    options = {"sub_blocks": given["sub_blocks"], "scale": given["scale"]}
    with pytest.raises(NotImplementedError, match=reason):
        score_blocks(x, x, **options, backend="triton")
    score_blocks(x, x, **options, backend="reference")


def test_a_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the interpreter is for tests")

    monkeypatch.setattr(kernel, "run", fail)
    x = torch.randn(1, 1, 8, 16)
    score_blocks(x, x, (2, 2))
    monkeypatch.setattr(language, "triton", None)
    with pytest.raises(NotImplementedError, match="triton is not installed"):
        score_blocks(x, x, (2, 2), backend="triton")
    monkeypatch.setattr(language, "INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        score_blocks(x, x, (2, 2), backend="triton")
