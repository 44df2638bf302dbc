"""The Hopper kernel of block scores: every edge of its tiles, strips and turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from seerattention import Threshold, TopK, TopP
from seerattention.ops import select_blocks as select_op
from seerattention.ops.cases.select_blocks import EIGHT_BITS, Case
from seerattention.ops.select_blocks import select_blocks
from seerattention.ops.select_blocks.kernels import choosing, scores
from seerattention.policies import Policy
from seerattention.testing.selections import Certain, arguments
from seerattention.testing.waiting import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def shares(name: str, queries: int, keys: int | None = None, **options: Any) -> Case:
    sizes = {"heads": 8, "kv_heads": 2, "head_dim": 128} | options
    gate = {"gate_dim": None, "shares": True} | sizes.pop("gate", {})
    return Case(name=name, queries=queries, keys=keys or queries, gate=gate, **sizes)


def subs(queries: int, keys: int) -> dict[str, int]:
    return {"q_sub_block": queries, "k_sub_block": keys, "gate_dim": 64}


#: Rows and blocks that end within tiles, at their ends and after; a strip of one tile and of several.
CASES = [
    *(shares(f"tokens-{n}", n) for n in (1, 4, 63, 64, 65, 255, 256, 257, 511, 512, 2047, 2048, 2049, 4173)),
    shares("later-chunk", 1000, 5003),
    shares("later-chunk-unaligned", 997, 33281),
    shares("one-query", 1, 7001),
    shares("batch", 2500, batch=3),
    shares("own-heads", 3000, heads=6, kv_heads=6),
    shares("one-kv-head", 3000, heads=5, kv_heads=1),
    shares("heads-of-64", 3000, head_dim=64, gate={"gate_dim": 64}),
    shares("subs-8", 5001, gate=subs(8, 8)),
    shares("subs-16", 5001, gate=subs(16, 16)),
    shares("subs-16-4", 5001, gate=subs(16, 4)),
    shares("blocks-of-32", 3001, block_size=(32, 32), gate=subs(4, 4)),
    *(shares(f"8-bits-{n}", n, gate=EIGHT_BITS) for n in (1, 65, 2049, 4173)),
    shares("8-bits-batch", 2500, batch=3, gate=EIGHT_BITS),
    shares("8-bits-later-chunk", 997, 33281, gate=EIGHT_BITS),
    shares("8-bits-subs-8", 5001, gate=subs(8, 8) | EIGHT_BITS),
    shares("8-bits-subs-16-4", 5001, gate=subs(16, 4) | EIGHT_BITS),
    shares("blocks-of-128", 5001, block_size=(128, 128), gate=subs(4, 4)),
    shares("blocks-of-128-later-chunk", 997, 33281, block_size=(128, 128), gate=subs(4, 4)),
    shares("8-bits-blocks-of-128", 5001, block_size=(128, 128), gate=subs(4, 4) | EIGHT_BITS),
    shares("queries-of-128", 3001, block_size=(64, 64), gate=subs(1, 4)),
]
POLICIES = [TopK(0.1), TopK(0.3, sink_blocks=2, dense_last_rows=1), Threshold(5e-4), TopP(0.9)]


def certain_of(policy: Policy, args: dict[str, Any]) -> Certain:
    adding = 0.0 if args["scorer"].score_dtype is None else scores.HOPPER_ADDING
    return Certain.of(policy=policy, **args, rounding=scores.HOPPER_ROUNDING, adding=adding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_chooses_as_any_right_backend(case: Case, dtype: torch.dtype) -> None:
    args = arguments(case, dtype, "cuda")
    # Sums in fp16 leave less certain, most of all what a sum of shares decides.
    few_bits = args["scorer"].score_dtype is not None
    for policy in POLICIES:
        certain = certain_of(policy, args)
        assert certain.share > (0.5 if few_bits else 0.9)
        selection = select_blocks(policy=policy, **args, backend="hopper")
        certain.check(selection)
        if few_bits:
            mask, same = (
                x.to_mask() for x in (selection, select_blocks(policy=policy, **args, backend="triton"))
            )
            assert (mask != same).sum() <= 0.01 * same.sum()


@pytest.mark.parametrize("name", ["tokens-4173", "later-chunk-unaligned", "batch", "8-bits-batch"])
def test_calls_repeat_to_the_bit(name: str) -> None:
    args = arguments(next(c for c in CASES if c.name == name), torch.bfloat16, "cuda")
    first = select_blocks(policy=TopK(0.1), **args, backend="hopper").bits
    for _ in range(200):
        assert torch.equal(select_blocks(policy=TopK(0.1), **args, backend="hopper").bits, first)


@pytest.mark.parametrize("gate", [{}, EIGHT_BITS], ids=["16-bits", "8-bits"])
def test_chunks_and_strips_of_other_sizes(gate: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(shares("long", 9001, gate=gate), torch.bfloat16, "cuda")
    certain = certain_of(TopK(0.1), args)
    for strip, items, size, summaries in ((1, 1, 2**30, 2**30), (3, 1, 2**22, 2**22), (64, 1, 2**20, 2**19)):
        monkeypatch.setattr(scores, "HOPPER_STRIP", strip)
        monkeypatch.setattr(scores, "HOPPER_ITEMS", items)
        monkeypatch.setattr(choosing, "SHARE_BYTES", size)
        monkeypatch.setattr(choosing, "SUMMARY_BYTES", summaries)
        certain.check(select_blocks(policy=TopK(0.1), **args, backend="hopper"))


def test_what_lies_behind_the_keys_is_in_no_score() -> None:
    args = arguments(shares("padded", 3001), torch.bfloat16, "cuda")
    wanted = select_blocks(policy=TopK(0.1), **args, backend="hopper").bits
    keys = args["k_blocks"]
    # Memory that the copy of whole quarters will get.
    quarter = scores.HOPPER_BLOCKS // 4 * 16
    whole = -(-keys.shape[2] // quarter) * quarter
    del args["k_blocks"]
    for _ in range(3):
        stale = keys.new_full((*keys.shape[:2], whole, keys.shape[3]), torch.nan)
        del stale
        assert torch.equal(
            select_blocks(policy=TopK(0.1), **args, k_blocks=keys, backend="hopper").bits, wanted
        )


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_host_is_not_waited_for(policy: Policy) -> None:
    args = arguments(shares("thousands", 6000), torch.bfloat16, "cuda")
    select_blocks(policy=policy, **args)
    torch.cuda.synchronize()
    with no_waiting():
        select_blocks(policy=policy, **args)


def test_auto_takes_it_and_says_why_it_takes_another() -> None:
    args = arguments(shares("auto", 1000), torch.bfloat16, "cuda") | {"policy": TopK(0.1)}
    assert select_op.BACKENDS["hopper"].unsupported(**args) == []
    for case, reason in (
        (shares("wide", 1000, gate={"gate_dim": 96}), "it takes summaries of 64 numbers, not 96"),
        (shares("many", 1000, gate=subs(4, 1)), "a KV block must have 4, 8, 12, 16 or 32 summaries, not 64"),
        (shares("products", 1000, gate={"shares": False}), "it takes scorers that compare shares"),
    ):
        other = arguments(case, torch.bfloat16, "cuda") | {"policy": TopK(0.1)}
        assert reason in select_op.BACKENDS["hopper"].unsupported(**other)
        select_blocks(**other)
