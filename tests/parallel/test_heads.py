"""The part of gates and policies that one process of several has."""

import dataclasses

import pytest
import torch

from seerattention.gate import AttnGate, GateConfig
from seerattention.parallel.heads import gate_of, heads_of, policy_of
from seerattention.policies import Calibrated, Calibration, TopK

SHAPE = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "block_size": 16, "rope_theta": 500.0}
MERGED = "one score per KV head"
DESIGNS = {
    "default": {},
    "shares": {"shares": True},
    MERGED: {"per_kv_head": True},
    "keys alone": {"q_proj": False, "q_pool": ("avg",), "gate_dim": 32},
    "norms": {"qk_norm": True},
}
# A group's queries are not split where they score once.
PARTS = [(name, size) for name in DESIGNS for size in (1, 2, 4, 8) if name != MERGED or size < 8]


def test_heads_in_order():
    assert [heads_of(8, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert [heads_of(2, rank, 4) for rank in range(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
    assert [heads_of(1, rank, 2) for rank in range(2)] == [slice(0, 1)] * 2


@pytest.mark.parametrize(("name", "size"), PARTS)
@torch.no_grad()
def test_a_part_scores_as_the_whole_does(name, size):
    gate = AttnGate(GateConfig(**SHAPE, **DESIGNS[name]))
    for weight in gate.parameters():
        weight.normal_()
    q, k = torch.randn(1, 8, 70, 32), torch.randn(1, 4, 70, 32)
    whole = gate(q, k)
    for rank in range(size):
        heads, kv = heads_of(8, rank, size), heads_of(4, rank, size)
        part = gate_of(gate, rank, size)(q[:, heads], k[:, kv])
        assert torch.equal(part, whole[:, kv if gate.config.per_kv_head else heads])


@pytest.mark.parametrize("heads", [4, 8])
def test_calibrated_limits_go_with_their_heads(heads):
    laws = {layer: tuple((float(head), 0.0, 0.0) for head in range(heads)) for layer in (0, 3)}
    policy = Calibrated(Calibration("density", 0.1, 4096, (16, 16), 0.0, 0.1, laws))
    part = policy_of(policy, 1, 2)
    expected = [2.0, 3.0] if heads == 4 else [4.0, 5.0, 6.0, 7.0]
    assert [law[0] for law in part.calibration.laws[3]] == expected
    assert dataclasses.replace(part, calibration=policy.calibration) == policy
    assert policy_of(TopK(0.1), 1, 2) == TopK(0.1)


def test_a_part_is_the_gates_alone():
    """It has the precision and rotary code of the whole, and nothing of it is drawn or shared."""
    gate, state = AttnGate(GateConfig(**SHAPE)).bfloat16(), torch.get_rng_state()
    part = gate_of(gate, 1, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert part.rotary is gate.rotary
    assert part.linear_q.weight.dtype == torch.bfloat16
    before = part.linear_q.weight.clone()
    gate.linear_q.weight.data.zero_()
    assert torch.equal(part.linear_q.weight, before)
