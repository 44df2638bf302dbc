"""`select_blocks` where no kernel runs: packed sequences, shards, and what has no fused form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from seerattention import AttnGate, GateConfig, TopK, TopP, baselines, causal_blocks
from seerattention.ops import score_blocks as score_op
from seerattention.ops import select_blocks as select_op
from seerattention.ops import summarise_blocks as summarise_op
from seerattention.ops.cases.select_blocks import CASES, ODD
from seerattention.ops.select_blocks import select_blocks
from seerattention.policies import Policy
from seerattention.rows import Rows, num_blocks
from seerattention.testing.selections import alone, arguments

PACKED = [case for case in CASES if case.lengths]
plain = pytest.mark.parametrize("backend", ["reference", "composed"])


def of_baseline(name: str) -> dict[str, Any]:
    """Arguments of a call with a baseline on the sequences `ODD`."""
    scorer, rows = baselines.create(name, block_size=(16, 16)), Rows.packed(ODD)
    q, k = torch.randn(1, 4, rows.num_queries, 16), torch.randn(1, 2, rows.num_keys, 16)
    parts = [
        scorer.compress(k[:, :, one], positions=torch.arange(tokens))
        for one, (_, tokens) in zip(rows.places(rows.num_keys), ODD, strict=True)
    ]
    longest = max(part.shape[2] for part in parts)
    k_blocks = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2]), value=torch.nan) for part in parts])
    return {"scorer": scorer, "q": q, "k_blocks": k_blocks, "rows": rows}


def check_alone(args: dict[str, Any], policy: Policy, backend: str) -> None:
    """Compare every packed sequence's rows with the same sequence alone, to the bit."""
    together = select_blocks(policy=policy, **args, backend=backend)
    size = args["scorer"].block_size
    assert together.shape[2:] == args["rows"].num_blocks(size)
    together.check(args["rows"])
    places = {one.index: place for one, place in args["rows"].maps(size)}
    for one, own in alone(args):
        mask = select_blocks(policy=policy, **own, backend=backend).to_mask()
        assert torch.equal(together.to_mask()[(slice(None), slice(None), *places[one.index])], mask)


@plain
@pytest.mark.parametrize("policy", [TopK(0.3), TopP(0.6, sink_blocks=1, dense_last_rows=2)], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
@torch.no_grad()
def test_packed_sequences_choose_as_alone(case: Any, policy: Policy, backend: str) -> None:
    check_alone(arguments(case), policy, backend)


@plain
@pytest.mark.parametrize("name", baselines.names())
def test_baselines_choose_in_packed_sequences_as_alone(name: str, backend: str) -> None:
    check_alone(of_baseline(name), TopK(0.3), backend)


@pytest.mark.parametrize("name", baselines.names())
def test_tokens_per_summary_are_what_compress_makes(name: str) -> None:
    scorer = baselines.create(name, block_size=(16, 16))
    for tokens in (1, 15, 16, 17, 63):
        k_blocks = scorer.compress(torch.randn(1, 2, tokens, 16), positions=torch.arange(tokens))
        assert k_blocks.shape[2] == num_blocks(tokens, scorer.tokens_per_summary)


@plain
@torch.no_grad()
def test_other_sequences_and_what_they_leave_are_not_read(backend: str) -> None:
    args = arguments(PACKED[0])
    rows, gate = args["rows"], args["scorer"]
    whole = select_blocks(policy=TopK(0.3), **args, backend=backend).bits
    for one, (down, _) in rows.maps(gate.block_size):
        q, k_blocks = torch.full_like(args["q"], torch.nan), torch.full_like(args["k_blocks"], torch.nan)
        own = one.index, slice(None), slice(0, num_blocks(one.rows.num_keys, gate.tokens_per_summary))
        q[:, :, one.queries], k_blocks[own] = args["q"][:, :, one.queries], args["k_blocks"][own]
        found = select_blocks(policy=TopK(0.3), **args | {"q": q, "k_blocks": k_blocks}, backend=backend)
        assert torch.equal(found.bits[:, :, down], whole[:, :, down])


@plain
@torch.no_grad()
def test_lengths_that_only_a_device_knows_are_asked_for(backend: str) -> None:
    args = arguments(PACKED[1])
    rows = args["rows"]
    unknown = Rows.from_starts(rows.starts_q, rows.starts_k, rows.num_queries, rows.num_keys)
    masks = [select_blocks(policy=TopK(0.3), **args | {"rows": r}, backend=backend) for r in (rows, unknown)]
    assert torch.equal(masks[0].bits, masks[1].bits)


@plain
@pytest.mark.parametrize("name", ["gate", "quest", "xattention", "oracle"])
@torch.no_grad()
def test_a_shard_chooses_as_the_whole(name: str, backend: str) -> None:
    """Keys after the queries are there, and not seen."""
    size = {"block_size": (16, 16)}
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16, q_sub_block=8, k_sub_block=8))
    scorer = gate if name == "gate" else baselines.create(name, **size)
    q, k, positions = torch.randn(1, 4, 160, 16), torch.randn(1, 2, 160, 16), torch.arange(160)
    k_blocks, policy = scorer.compress(k, positions=positions), TopP(0.6)
    whole = select_blocks(q, k_blocks, scorer, policy, backend=backend).to_mask()
    for first in (0, 64):
        shard = q[:, :, first : first + 64]
        part = select_blocks(
            shard, k_blocks, scorer, policy, rows=Rows.at(first, 64), backend=backend
        ).to_mask()
        assert torch.equal(part, whole[:, :, first // 16 : first // 16 + 4, : part.shape[3]])
        assert not whole[:, :, first // 16 : first // 16 + 4, part.shape[3] :].any()


@torch.no_grad()
def test_a_packed_batch_is_one_call_of_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for op in (summarise_op, score_op, select_op):
        monkeypatch.setattr(op, "choose", _noted(op.choose, called, op.__name__.split(".")[-1]))
    args = arguments(PACKED[0])
    called.clear()
    select_blocks(policy=TopK(0.3), **args)
    assert sorted(called) == ["score_blocks", "select_blocks", "summarise_blocks"]


def _noted(inner: Any, called: list[str], name: str) -> Any:
    def choose(*args: Any, **options: Any) -> Any:
        called.append(name)
        return inner(*args, **options)

    return choose


@torch.no_grad()
def test_the_reference_takes_references(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(CASES[4])
    wanted = select_blocks(policy=TopK(0.3), **args)
    monkeypatch.setattr(score_op.BACKENDS["chunked"], "run", None)
    assert torch.equal(select_blocks(policy=TopK(0.3), **args, backend="reference").bits, wanted.bits)


def test_queries_are_all_tokens_if_nothing_else_is_said() -> None:
    scorer = baselines.create("quest", block_size=(16, 16))
    q, k = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16)
    selection = select_blocks(q, scorer.compress(k, positions=torch.arange(100)), scorer, TopK(1.0))
    assert torch.equal(selection.to_mask()[0, 0], causal_blocks(100, 100, (16, 16)))
