"""The Triton kernel interpreted; `tests/ops/test_triton.py` runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch

from seerattention.baselines import create
from seerattention.gate import AttnGate, GateConfig, LengthRotary
from seerattention.ops.cases.select_decode_blocks import CASES, Case
from seerattention.ops.update_summaries import triton as backend
from seerattention.ops.update_summaries import update_summaries
from seerattention.testing.summaries import check_updates

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_check(case: Case) -> None:
    check_updates(backend, case)


def test_half_precision() -> None:
    check_updates(backend, BY_NAME["two-sub-blocks"], torch.float16)


def test_keys_projected_once_per_query_head() -> None:
    gate = {"per_kv_head": False, "q_proj": False, "q_pool": ("avg",), "gate_dim": 32}
    check_updates(backend, Case(name="", keys=200, gate=gate))


def test_room_that_ends_inside_a_block_is_not_written() -> None:
    gate = AttnGate(GateConfig(4, 2, 32, 16, k_sub_block=4)).requires_grad_(False)
    summaries = torch.full((1, 2, 8, gate.config.dim), torch.nan)
    tail, k = torch.randn(1, 2, 16, 32), torch.randn(1, 2, 1, 32)
    lengths = torch.tensor([32], dtype=torch.int32)
    update_summaries(summaries[:, :, :6], tail, k, gate.per_token(), lengths=lengths, backend="triton")
    assert summaries[:, :, :4].isnan().all()
    assert summaries[:, :, 6:].isnan().all()
    assert not summaries[:, :, 4:6].isnan().any()


def test_reasons_why_not() -> None:
    gate = AttnGate(GateConfig(4, 2, 32, 16, gate_dim=32))
    args = {"tail": torch.zeros(1, 2, 16, 32), "k": torch.zeros(1, 2, 1, 32)}
    args |= {"summaries": torch.zeros(1, 2, 8, 32), "lengths": torch.ones(1, dtype=torch.int32)}
    with pytest.raises(NotImplementedError, match=r"torch.float32, the gate's dtype, not torch.float16"):
        update_summaries(
            **args | {"summaries": args["summaries"].half()}, scorer=gate.per_token(), backend="triton"
        )
    gate.use_rotary(LengthRotary(gate.rotary))
    with pytest.raises(NotImplementedError, match="depends on the length of the text"):
        update_summaries(**args, scorer=gate.per_token(), backend="triton")
    quest = create("quest", block_size=(16, 16)).per_token()
    with pytest.raises(NotImplementedError, match="Quest is no gate"):
        update_summaries(**args, scorer=quest, backend="triton")
