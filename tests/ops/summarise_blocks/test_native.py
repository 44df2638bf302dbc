"""Summaries by the CPU's kernel, compiled for every kind of CPU that this one can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seerattention.ops.cases.summarise_blocks import CASES, Case
from seerattention.ops.options import SummaryOptions
from seerattention.ops.summarise_blocks import native, summarise_blocks
from seerattention.testing.summaries import budget, inputs

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MERGED = Case(name="merged", tokens=77, heads=4, heads_out=2, width=20, dim=12, norm=True)


@pytest.mark.parametrize("dtype", DTYPES)
@by_case
def test_within_the_error_budget(level: str, case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    wanted = budget(case, given)
    made = summarise_blocks(given.pop("x"), case.size, case.pools, **given, backend="native")
    assert made.dtype == dtype
    wanted.check(made)


def test_summaries_in_another_dtype_than_the_tokens(level: str) -> None:
    case = CASES[4]
    given = inputs(case)
    x = given.pop("x").half()
    wanted = budget(case, {"x": x.float(), **given})
    wanted.check(summarise_blocks(x, case.size, case.pools, dtype=torch.float32, **given, backend="native"))


def test_merged_heads(level: str) -> None:
    x, weight = torch.randn(2, 4, 77, 20), torch.randn(2, 2 * 3 * 20, 12)
    given: dict[str, Any] = {"weight": weight, "merge": 2, "norm": torch.rand(12)}
    mine, wanted = (
        summarise_blocks(x, 8, ("max", "min", "avg"), **given, backend=backend)
        for backend in ("native", "reference")
    )
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_one_rotation_for_the_whole_batch(level: str) -> None:
    case = CASES[4]
    given = inputs(case)
    x = given.pop("x")
    alone = tuple(t[:1] for t in given["rotary"])
    both = tuple(t[:1].expand(2, -1, -1) for t in given["rotary"])
    outs = [
        summarise_blocks(x, case.size, case.pools, **given | {"rotary": turns}, backend="native")
        for turns in (alone, both)
    ]
    assert torch.equal(*outs)


def test_one_cosine_for_the_whole_batch_and_a_sine_for_each(level: str) -> None:
    case = CASES[4]
    given = inputs(case)
    cos, sin = given["rotary"]
    for turns in ((cos[:1], sin), (cos, sin[:1])):
        mine, wanted = (
            summarise_blocks(
                given["x"], case.size, case.pools, weight=given["weight"], rotary=turns, backend=b
            )
            for b in ("native", "reference")
        )
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.randn(4, 20, 6)}, r"x must be \[B, H, T, D\], got \[4, 20, 6\]"),
        ({"size": 0}, "blocks must be of at least one token, got 0"),
        ({"pools": ()}, r"pools must be some of max, min, avg, each once, got \(\)"),
        ({"pools": ("median", "max")}, "pools must be some of max, min, avg"),
        ({"pools": ("max", "max")}, "pools must be some of max, min, avg, each once"),
        ({"merge": 3}, "heads must be a multiple of merge=3, one at least, got 4"),
        ({"x": torch.randn(2, 0, 20, 6)}, "heads must be a multiple of merge=1, one at least, got 0"),
        ({"weight": torch.randn(4, 12, 8, 2)}, r"weight must be .*, got \[4, 12, 8, 2\]"),
        ({"weight": torch.randn(6, 12, 8)}, r"weight must be \[a multiple of 4, 1 \* 2 \* 6, E\]"),
        ({"weight": torch.randn(4, 13, 8)}, r"weight must be \[a multiple of 4, 1 \* 2 \* 6, E\]"),
        ({"norm": torch.ones(1)}, r"norm must be \[8\], got \[1\]"),
        ({"norm": torch.ones(4, 8)}, r"norm must be \[8\], got \[4, 8\]"),
        ({"rotary": tuple(torch.randn(2, 2, 3, 8))}, r"cos must be \[2 or 1, 5, 8\], got \[2, 3, 8\]"),
        ({"rotary": tuple(torch.randn(2, 3, 5, 8))}, r"cos must be \[2 or 1, 5, 8\], got \[3, 5, 8\]"),
        (
            {"weight": torch.randn(4, 12, 7), "rotary": tuple(torch.randn(2, 2, 5, 7))},
            "pairs .*, and summaries have 7",
        ),
    ],
)
def test_arguments_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    fine = {
        "x": torch.randn(2, 4, 20, 6),
        "size": 4,
        "pools": ("max", "avg"),
        "weight": torch.randn(4, 12, 8),
    }
    with pytest.raises(ValueError, match=message):
        summarise_blocks(**fine | wrong)


@pytest.mark.parametrize("name", ["packed", "packed-pools"])
def test_packed_sequences_are_those_alone(level: str, name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    given = inputs(case)
    x, rows, turns = given.pop("x"), given.pop("rows"), given.pop("rotary")
    options = {"size": case.size, "pools": case.pools, "backend": "native"} | given
    whole = summarise_blocks(x, rows=rows, rotary=turns, **options)
    for tokens, blocks in zip(rows.places(case.tokens), rows.places(case.tokens, case.size), strict=True):
        if tokens.start == tokens.stop:
            continue
        own = None if turns is None else tuple(t[:, blocks] for t in turns)
        assert torch.equal(whole[:, :, blocks], summarise_blocks(x[:, :, tokens], rotary=own, **options))
        poisoned = torch.full_like(x, torch.nan)
        poisoned[:, :, tokens] = x[:, :, tokens]
        poisoned = summarise_blocks(poisoned, rows=rows, rotary=turns, **options)
        assert torch.equal(poisoned[:, :, blocks], whole[:, :, blocks])


def test_layouts_and_threads_change_no_bit(level: str) -> None:
    case = CASES[4]
    given = inputs(case)
    x = given.pop("x")
    plain = summarise_blocks(x, case.size, case.pools, **given, backend="native")
    for other in (x.contiguous(), x.mT.contiguous().mT):
        assert torch.equal(summarise_blocks(other, case.size, case.pools, **given, backend="native"), plain)
    torch.set_num_threads(3)
    assert torch.equal(summarise_blocks(x, case.size, case.pools, **given, backend="native"), plain)
    torch.set_num_threads(1)


def test_opaque_to_the_compiler(level: str) -> None:
    given = inputs(CASES[4])
    x = given.pop("x")

    def made(x: torch.Tensor) -> torch.Tensor:
        return summarise_blocks(x, 8, ("max", "avg", "min"), **given, backend="native")

    assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


def test_bugs_are_noticed(level: str) -> None:
    case = next(c for c in CASES if c.name == "norm")
    given = inputs(case)
    wanted = budget(case, given)
    turned = tuple(t.roll(1, 1) for t in given["rotary"])
    x = given.pop("x")
    for size, pools, changed in (
        (case.size, ("min", "max", "avg"), {}),
        (case.size, case.pools, {"rotary": turned}),
        (case.size, case.pools, {"norm": None}),
        (case.size, case.pools, {"weight": given["weight"].flip(0)}),
    ):
        with pytest.raises(AssertionError):
            wanted.check(summarise_blocks(x, size, pools, **given | changed, backend="native"))


def test_reasons_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: None)
    x = torch.randn(1, 2, 8, 32)

    def why_not(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[str]:
        return native.unsupported(x, SummaryOptions(size=8, pools=("avg",), dtype=dtype))

    assert why_not(x) == why_not(x.half()) == []
    assert why_not(x.double(), torch.float64) == ["it takes float32, bfloat16 and float16"]
    assert why_not(x, torch.bfloat16) == [
        "it does not round tokens, torch.float32, before they are pooled, to torch.bfloat16"
    ]
    assert why_not(x.requires_grad_()) == ["it has no backward"]
    assert why_not(x.to("meta")) == ["it runs on a CPU, not on meta"]
