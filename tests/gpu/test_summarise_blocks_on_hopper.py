"""The Hopper kernel of summaries: every edge of its blocks, items and heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention.ops import summarise_blocks as summarise_op
from seerattention.ops.options import SummaryOptions
from seerattention.ops.summarise_blocks import hopper, summarise_blocks
from seerattention.scorer import narrowed
from seerattention.testing.budget import Budget
from seerattention.testing.waiting import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

POOLS = ("max", "min", "avg")


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hopper, "LEAST_TOKENS", 0)
    with torch.no_grad():
        yield


def inputs(
    tokens: int,
    *,
    heads: int = 8,
    batch: int = 1,
    width: int = 128,
    dim: int = 64,
    size: int = 4,
    pools: tuple[str, ...] = POOLS,
    turns: int | None = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Return the arguments of a call whose angles are of so many sequences; None for no rotation."""
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, heads, width, device="cuda").to(dtype).transpose(1, 2)
    rows = len(pools) * width
    weight = (torch.randn(heads, rows, dim, device="cuda") / rows**0.5).to(dtype)
    angle = torch.rand(turns or 1, -(-tokens // size), dim, device="cuda") * 6
    rotary = None if turns is None else (angle.cos(), angle.sin())
    return {"x": x, "size": size, "pools": pools, "weight": weight, "rotary": rotary}


def with_other(given: dict[str, Any], **tensors: Tensor) -> dict[str, Any]:
    return given | tensors


def check(given: dict[str, Any]) -> None:
    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return summarise_blocks(**with_other(given, x=x, weight=weight), backend="reference")

    Budget.of(reference, given["x"], given["weight"]).check(summarise_blocks(**given, backend="hopper"))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 63, 64, 65, 255, 256, 257, 511, 512, 4173])
def test_blocks_and_items_that_end_anywhere(tokens: int) -> None:
    check(inputs(tokens))


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 3, "heads": 6},
        {"batch": 3, "heads": 6, "turns": 3},
        {"heads": 28},
        {"heads": 32, "batch": 5},
        {"heads": 1},
        {"turns": None},
        {"dtype": torch.float16},
        {"dtype": torch.float16, "width": 64, "turns": None},
        {"width": 64},
        {"dim": 16},
        {"dim": 32},
        {"dim": 128},
        {"size": 2},
        {"size": 8},
        {"size": 16},
        {"pools": ("avg",)},
        {"pools": ("min", "max")},
        {"pools": ("avg", "min", "max")},
    ],
    ids=str,
)
def test_all_it_takes(options: dict[str, Any]) -> None:
    check(inputs(2053, **options))


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_many_items_of_many_heads(size: int) -> None:
    check(inputs(32771, heads=32, size=size))


@pytest.mark.parametrize("options", [{"tokens": 1030, "heads": 28, "batch": 2}, {"tokens": 5003, "size": 2}])
def test_heads_that_end_within_a_program(options: dict[str, Any]) -> None:
    check(inputs(**options))


def test_tokens_anywhere_in_memory() -> None:
    given = inputs(1001)
    x = given["x"]
    # Heads before tokens, queries out of a joint projection, tokens after others.
    joint = torch.cat([x, x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)
    later = torch.cat([torch.full_like(x[:, :, :3], torch.nan), x], 2)
    wanted = summarise_blocks(**given, backend="hopper")
    for same in (x.contiguous(), joint[:, 8:16], later[:, :, 3:]):
        assert torch.equal(summarise_blocks(**with_other(given, x=same), backend="hopper"), wanted)


@pytest.mark.parametrize("tokens", [1, 5, 255, 257, 1003])
def test_what_lies_behind_the_tokens_is_in_no_summary(tokens: int) -> None:
    given = inputs(tokens, batch=2)
    x = given["x"]
    longer = torch.cat([x, torch.full_like(x[:, :, :1].expand(-1, -1, 300, -1), torch.nan)], 2)
    longer = longer.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = summarise_blocks(**given, backend="hopper")
    assert torch.equal(
        summarise_blocks(**with_other(given, x=longer[:, :, :tokens]), backend="hopper"), wanted
    )
    check(with_other(given, x=longer[:, :, :tokens]))


@pytest.mark.parametrize(
    "options", [{"tokens": 4173}, {"tokens": 8192, "heads": 32}, {"tokens": 1003, "batch": 3}]
)
def test_calls_repeat_to_the_bit(options: dict[str, Any]) -> None:
    given = inputs(**options)
    first = summarise_blocks(**given, backend="hopper")
    for _ in range(200):
        assert torch.equal(summarise_blocks(**given, backend="hopper"), first)


def test_the_host_is_not_waited_for() -> None:
    given = inputs(4000)
    summarise_blocks(**given)
    torch.cuda.synchronize()
    with no_waiting():
        summarise_blocks(**given)


def test_it_compiles_with_torch() -> None:
    given = inputs(3001)
    compiled = torch.compile(
        lambda x: summarise_blocks(**with_other(given, x=x), backend="hopper"), fullgraph=True
    )
    assert torch.equal(compiled(given["x"]), summarise_blocks(**given, backend="hopper"))


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("tokens", [1, 257, 4173])
def test_rounded_as_what_is_not_is_rounded_later(tokens: int, backend: str) -> None:
    few = torch.float8_e4m3fn
    given = inputs(tokens)
    given["weight"] *= 300
    whole = summarise_blocks(**given, backend=backend)
    assert whole.abs().max() > 448 > whole.abs().median()
    out = summarise_blocks(**given, rounded_to=few, backend=backend)
    assert torch.equal(out.float(), narrowed(whole, few).float())
    compiled = torch.compile(lambda x: summarise_blocks(**given | {"x": x}, rounded_to=few, backend=backend))
    assert torch.equal(compiled(given["x"]).float(), out.float())


def test_auto_takes_it_for_all_but_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "LEAST_TOKENS", 8 * 2048)
    backends = summarise_op.BACKENDS
    for tokens, name in ((2048, "hopper"), (2047, "triton")):
        given = inputs(tokens)
        options = SummaryOptions(dtype=torch.bfloat16, **{k: v for k, v in given.items() if k != "x"})
        assert bool(backends["hopper"].unsupported(given["x"], options)) == (name == "triton")
        wanted = summarise_blocks(**given, backend=name)
        assert torch.equal(summarise_blocks(**given), wanted)
