from __future__ import annotations

from typing import Any

import pytest
import torch

from seerattention.ops import language
from seerattention.ops.cases.summarise_blocks import CASES, Case
from seerattention.ops.summarise_blocks import BACKENDS, summarise_blocks
from seerattention.rows import Rows
from seerattention.scorer import narrowed
from seerattention.testing.summaries import budget, inputs

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    wanted = budget(case, given)
    wanted.check(summarise_blocks(given.pop("x"), case.size, case.pools, **given, backend="triton"))


def test_summaries_in_another_dtype_than_the_tokens() -> None:
    case = CASES[4]
    given = inputs(case)
    x = given.pop("x").half()
    wanted = budget(case, {"x": x.float(), **given})
    out = summarise_blocks(x, case.size, case.pools, dtype=torch.float32, **given, backend="triton")
    wanted.check(out)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["sixteen", "thousand"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounded_as_what_is_not_is_rounded_later(name: str, backend: str, dtype: torch.dtype) -> None:
    case = next(c for c in CASES if c.name == name)
    given = inputs(case, dtype)
    # Some are beyond the largest number of eight bits.
    given["weight"] = given["weight"] * 300
    x, few = given.pop("x"), torch.float8_e4m3fn
    whole = summarise_blocks(x, case.size, case.pools, **given, backend=backend)
    assert whole.abs().max() > 448 > whole.abs().median()
    out = summarise_blocks(x, case.size, case.pools, rounded_to=few, **given, backend=backend)
    assert out.dtype == few
    assert torch.equal(out.float(), narrowed(whole, few).float())


def test_what_it_does_not_round() -> None:
    x = torch.randn(1, 1, 40, 16)
    with pytest.raises(NotImplementedError, match="without a projection it does not round"):
        summarise_blocks(x, 8, ("avg",), rounded_to=torch.float8_e4m3fn, backend="triton")
    weight = torch.randn(1, 16, 8)
    with pytest.raises(NotImplementedError, match=r"to float8_e4m3fn, not to torch\.float8_e5m2"):
        summarise_blocks(x, 8, ("avg",), weight=weight, rounded_to=torch.float8_e5m2, backend="triton")
    with pytest.raises(NotImplementedError, match="interpreter rounds ties"):
        summarise_blocks(x, 8, ("avg",), weight=weight, rounded_to=torch.float8_e4m3fn, backend="triton")
    out = summarise_blocks(x, 8, ("avg",), rounded_to=torch.float8_e5m2)
    assert out.dtype == torch.float8_e5m2


def test_one_rotation_for_the_whole_batch() -> None:
    case = CASES[4]
    given = inputs(case)
    x = given.pop("x")
    alone = tuple(t[:1] for t in given["rotary"])
    both = tuple(t[:1].expand(2, -1, -1) for t in given["rotary"])
    outs = [
        summarise_blocks(x, case.size, case.pools, **given | {"rotary": turns}, backend="triton")
        for turns in (alone, both)
    ]
    assert torch.equal(*outs)


def test_unused_tokens_cannot_reach_a_summary() -> None:
    x = torch.randn(1, 1, 40, 16)
    whole = summarise_blocks(x, 8, ("avg",), backend="triton")
    part = summarise_blocks(x[:, :, :35], 8, ("avg",), backend="triton")
    assert torch.equal(whole[:, :, :4], part[:, :, :4])


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["packed", "packed-pools"])
def test_packed_sequences_are_those_alone(name: str, backend: str) -> None:
    case = next(c for c in CASES if c.name == name)
    given = inputs(case)
    x, rows, turns = given.pop("x"), given.pop("rows"), given.pop("rotary")
    options = {"size": case.size, "pools": case.pools, "backend": backend} | given
    whole = summarise_blocks(x, rows=rows, rotary=turns, **options)
    for tokens, blocks in zip(rows.places(case.tokens), rows.places(case.tokens, case.size), strict=True):
        if tokens.start == tokens.stop:
            continue
        own = None if turns is None else tuple(t[:, blocks] for t in turns)
        alone = summarise_blocks(x[:, :, tokens], rotary=own, **options)
        if backend == "reference" or case.heads_out == 0:
            assert torch.equal(whole[:, :, blocks], alone)
        else:
            # Where a row lies in a product may change how numpy, the interpreter's, sums it up.
            sequence = {"x": x[:, :, tokens], "rows": None, "rotary": own, **given}
            budget(case, sequence).check(whole[:, :, blocks])
        poisoned = torch.full_like(x, torch.nan)
        poisoned[:, :, tokens] = x[:, :, tokens]
        poisoned = summarise_blocks(poisoned, rows=rows, rotary=turns, **options)
        assert torch.equal(poisoned[:, :, blocks], whole[:, :, blocks])


def test_what_packed_sequences_cannot_be() -> None:
    rows = Rows.packed([(8, 8), (8, 8)])
    with pytest.raises(ValueError, match="20 tokens are neither the 16 queries nor the 16 keys"):
        summarise_blocks(torch.randn(1, 1, 20, 16), 8, ("avg",), rows=rows)
    with pytest.raises(ValueError, match="lie in one batch entry, x has 2"):
        summarise_blocks(torch.randn(2, 1, 16, 16), 8, ("avg",), rows=rows)
    unknown = Rows.from_starts(rows.starts_q, rows.starts_k, 16, 16)
    with pytest.raises(NotImplementedError, match="host does not know the lengths"):
        summarise_blocks(torch.randn(1, 1, 16, 16), 8, ("avg",), rows=unknown, backend="triton")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": torch.randn(1, 64, 16)}, "it does not merge heads"),
        ({"pools": ("max", "avg"), "norm": torch.ones(64)}, "neither normalises nor rotates several pools"),
        ({"x": torch.randn(1, 2, 8, 32, dtype=torch.float64)}, "must be float16, bfloat16 or float32"),
        ({"x": torch.randn(1, 2, 8, 32).bfloat16(), "weight": torch.randn(2, 32, 16).bfloat16()}, "wrongly"),
        ({"x": torch.randn(1, 2, 8, 129)}, "up to 512 bytes"),
        ({"x": torch.randn(1, 2, 8, 32, requires_grad=True)}, "no backward"),
    ],
)
def test_reasons_why_not(change: dict[str, Any], reason: str) -> None:
    args = {"x": torch.randn(1, 2, 8, 32), "size": 8, "pools": ("avg",)} | change
    if reason == "it does not merge heads":
        args["merge"] = 2
    with pytest.raises(NotImplementedError, match=reason):
        summarise_blocks(**args, backend="triton")
    summarise_blocks(**args, backend="reference")


def test_a_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the interpreter is for tests")

    monkeypatch.setattr(BACKENDS["triton"], "run", fail)
    summarise_blocks(torch.randn(1, 2, 8, 32), 8, ("avg",))
    monkeypatch.setattr(language, "triton", None)
    with pytest.raises(NotImplementedError, match="triton is not installed"):
        summarise_blocks(torch.randn(1, 2, 8, 32), 8, ("avg",), backend="triton")
    monkeypatch.setattr(language, "INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        summarise_blocks(torch.randn(1, 2, 8, 32), 8, ("avg",), backend="triton")


def test_weight_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[a multiple of 2, 1 \* 1 \* 32, E\], got \[3, 32"):
        summarise_blocks(torch.randn(1, 2, 8, 32), 8, ("avg",), weight=torch.randn(3, 32, 16))


@pytest.mark.parametrize("shape", [(1, 63, 16), (1, 8, 8), (3, 8, 16)])
def test_rotation_of_another_shape(shape: tuple[int, ...]) -> None:
    right, wrong = torch.zeros(2, 8, 16), torch.zeros(shape)
    for turns, name in (((wrong, right), "cos"), ((right, wrong), "sin")):
        with pytest.raises(ValueError, match=rf"{name} must be \[2 or 1, 8, 16\], got"):
            summarise_blocks(torch.randn(2, 1, 64, 16), 8, ("avg",), rotary=turns)
