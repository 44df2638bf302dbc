"""The Triton kernels interpreted; `tests/ops/test_triton.py` runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch

from seerattention.baselines import create
from seerattention.gate import AttnGate, GateConfig, LengthRotary
from seerattention.ops.cases.select_decode_blocks import CASES, EACH_TOKEN, Case
from seerattention.ops.launch import Launch
from seerattention.ops.select_decode_blocks import select_decode_blocks
from seerattention.ops.select_decode_blocks import triton as backend
from seerattention.policies import Policy, Threshold, TokenBudget, TopP
from seerattention.testing.selections import Certain, decode_arguments

BY_NAME = {case.name: case for case in CASES}
POLICIES = [
    TokenBudget(48),
    TokenBudget(96, sink_blocks=2, local_blocks=3),
    TokenBudget(20, local_blocks=99),
    Threshold(0.04),
    Threshold(0.0, sink_blocks=1),
    TopP(0.7, sink_blocks=1),
]


def check(case: Case, policy: Policy, dtype: torch.dtype = torch.float32) -> None:
    args = decode_arguments(case, dtype)
    certain = Certain.of_tokens(policy=policy, **args)
    # A check that decides hardly anything would pass whatever happens.
    assert certain.share > 0.9
    for name in ("reference", "composed", "triton"):
        selection = select_decode_blocks(policy=policy, **args, backend=name)
        certain.check(selection)
        assert selection.block_size == case.block_size


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chooses_as_the_reference(case: Case) -> None:
    check(case, TokenBudget(64))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", ["ragged", "drafted", "nothing-finished", "each-token"])
def test_policies_and_knobs(name: str, policy: Policy) -> None:
    check(BY_NAME[name], policy)


@pytest.mark.parametrize("name", ["sub-blocks", "drafted", "each-token", "each-token-drafted"])
def test_half_precision(name: str) -> None:
    check(BY_NAME[name], TokenBudget(64), torch.float16)


def test_tiles_and_programs_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "QUERIES", Launch(16, 16, 4, 1))
    for columns, programs in ((16, 1), (16, 64), (128, 2)):
        monkeypatch.setattr(backend, "SCORES", Launch(16, columns, 4, 1))
        monkeypatch.setattr(Launch, "most_programs", lambda launch, device, most=programs: most)
        check(BY_NAME["several-tiles"], TokenBudget(160))


@pytest.mark.parametrize("name", ["each-token", "each-token-of-64", "each-of-20", "sub-blocks"])
def test_tiles_of_other_sizes_where_blocks_have_several_summaries(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Several blocks a tile, one, and several tiles a block; runs of one, two and all summaries of a block.
    for summaries, loaded, programs in ((128, 16, 1), (64, 32, 7), (32, 1024, 3)):
        monkeypatch.setattr(backend, "SUB_SCORES", Launch(16, summaries, 4, 1))
        monkeypatch.setattr(backend, "LOADED", loaded)
        monkeypatch.setattr(Launch, "most_programs", lambda launch, device, most=programs: most)
        check(BY_NAME[name], TokenBudget(160))


@pytest.mark.parametrize("blocks", [1, 2, 150, 606, 607, 2000])
def test_any_count_of_a_long_row(blocks: int) -> None:
    check(Case(name="long-row", keys=9700), TokenBudget(16 * blocks))


@pytest.mark.parametrize("subs", [1, 16])
def test_equal_scores_go_to_the_lower_block(subs: int) -> None:
    gate = EACH_TOKEN if subs > 1 else {}
    args = decode_arguments(Case(name="equal", keys=320, gate=gate))
    args["k_blocks"] = torch.zeros_like(args["k_blocks"])
    found = select_decode_blocks(policy=TokenBudget(64), **args, backend="triton").to_mask()[0, :, 0]
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[0, 1, 2, 19]] * 2


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(name="", keys=64, gate={"per_kv_head": False}), "the gate scores per query head"),
        (Case(name="", keys=1700, queries=65), "at most 64 tokens, not 65"),
        (Case(name="", keys=16 * 32769), "rows of at most 32768 blocks"),
    ],
)
def test_reasons_why_not(case: Case, reason: str) -> None:
    gate = AttnGate(GateConfig(**case.design))
    args = {
        "q": torch.zeros(1, 4, case.queries, 32),
        "k_blocks": torch.zeros(1, 2, case.keys // 16 + 1, gate.config.dim),
        "scorer": gate.per_token(),
        "lengths": torch.ones(1, dtype=torch.int32),
        "num_keys": case.keys,
        "kv_heads": 2,
    }
    with pytest.raises(NotImplementedError, match=reason):
        select_decode_blocks(policy=TokenBudget(64), **args, backend="triton")


def test_baselines_and_angles_by_length_run_elsewhere() -> None:
    args = decode_arguments(BY_NAME["one-token"])
    gate = args["scorer"].gate
    rotary = gate.rotary
    gate.use_rotary(LengthRotary(rotary))
    with pytest.raises(NotImplementedError, match="depends on the length of the text"):
        select_decode_blocks(policy=TokenBudget(64), **args, backend="triton")
    quest = create("quest", block_size=(16, 16)).per_token()
    args |= {"scorer": quest, "k_blocks": torch.zeros(1, 2, 19, 64)}
    with pytest.raises(NotImplementedError, match="Quest is no gate"):
        select_decode_blocks(policy=TokenBudget(64), **args, backend="triton")
