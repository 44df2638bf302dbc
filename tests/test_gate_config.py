"""The design of gates: its defaults, what is refused, and what is written and read back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from seerattention import AttnGate, GateConfig


def config(**options: Any) -> GateConfig:
    plain = {"q_sub_block": 8, "k_sub_block": 8, "gate_dim": 32}
    return GateConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 32} | plain | options)


@pytest.mark.parametrize(
    ("head_dim", "gate_dim"), [(64, 48), (80, 64), (96, 64), (128, 96), (256, 192), (16, 16), (8, 8)]
)
def test_the_default_is_narrower_than_a_head(head_dim: int, gate_dim: int) -> None:
    design = GateConfig(8, 2, head_dim)
    assert (design.dim, design.q_sub, design.k_sub) == (gate_dim, 4, 4)
    assert GateConfig(8, 2, head_dim, rope=False).dim == head_dim
    assert GateConfig(8, 2, head_dim, q_proj=False, q_pool=("avg",)).dim == head_dim


@pytest.mark.parametrize(
    "design",
    [
        config(),
        config(gate_dim=16, qk_norm=True, per_kv_head=True, q_pool=("avg",), init="random", rope_theta=5e5),
        GateConfig.published("Qmaxmin_Kavg", num_heads=8, num_kv_heads=2, head_dim=64, gate_dim=32),
    ],
)
def test_configuration_round_trip(design: GateConfig) -> None:
    assert GateConfig.from_dict(json.loads(json.dumps(design.to_dict()))) == design


def test_published_design() -> None:
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    plain = GateConfig.published(**sizes)
    assert (plain.q_pool, plain.k_pool, plain.q_proj) == (("avg",), ("max", "min", "avg"), False)
    assert (plain.q_sub, plain.k_sub, plain.dim) == (64, 64, 64)
    assert AttnGate(plain).linear_k.weight.shape == (8, 192, 64)
    for double in (
        GateConfig.published(**sizes, force_double=True),
        GateConfig.published("Qmaxmin_Kmaxminavg", **sizes),
        GateConfig.published(**sizes, gate_dim=32),
    ):
        assert double.q_proj
        assert AttnGate(double).linear_k.weight.shape == (2, 192, double.dim)
    assert not GateConfig.published(**sizes, gate_dim=64).q_proj


@pytest.mark.parametrize("name", ["", "Qavg", "Q_Kavg", "Qavg_K", "Qminmax_Kavg", "qavg_kavg", "Qavg_Kmean"])
def test_unknown_published_type(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown gate type {name!r}"):
        GateConfig.published(name, num_heads=8, num_kv_heads=2, head_dim=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be a whole number >= 1, got 0"),
        ({"num_kv_heads": -1}, "num_kv_heads must be a whole number >= 1, got -1"),
        ({"head_dim": 1.5}, "head_dim must be a whole number >= 1, got 1.5"),
        ({"block_size": None}, "block_size must be a whole number >= 1, got None"),
        ({"gate_dim": 0}, "gate_dim must be a whole number >= 1, got 0"),
        ({"q_sub_block": 0}, "q_sub_block must be a whole number >= 1, got 0"),
        ({"k_sub_block": "8"}, "k_sub_block must be a whole number >= 1, got '8'"),
        ({"num_heads": 5}, "num_heads=5 must be a multiple of num_kv_heads=2"),
        ({"q_pool": ()}, r"q_pool must name some of .*, got \(\)"),
        ({"k_pool": ("avg", "avg")}, "k_pool must name some of"),
        ({"k_pool": ("mean",)}, "k_pool must name some of"),
        ({"q_pool": "avg"}, "q_pool must name some of"),
        ({"q_sub_block": 7}, "q_sub_block=7 must divide block_size=64"),
        ({"k_sub_block": 128}, "k_sub_block=128 must divide block_size=64"),
        ({"gate_dim": 15}, "rotary positions need an even gate_dim, got 15"),
        ({"q_proj": False}, "without q_proj the gate needs one q pool"),
        ({"q_proj": False, "q_pool": ("avg",), "gate_dim": 16}, "without q_proj the gate needs one q pool"),
        ({"q_proj": False, "q_pool": ("avg",), "per_kv_head": True}, "per_kv_head merges"),
        ({"phase": "train"}, "phase must be 'prefill', 'decode' or 'both', got 'train'"),
        ({"score_dtype": "int8"}, "score_dtype must be 'float8_e4m3fn', or left out, got 'int8'"),
        (
            {"score_dtype": "float8_e4m3fn", "phase": "decode"},
            "score_dtype is for blocks of queries; gates of phase 'decode' score none",
        ),
        ({"init": "zeros"}, "init must be 'identity' or 'random', got 'zeros'"),
    ],
)
def test_impossible_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_configuration_of_before_phases_is_for_prefill() -> None:
    older = config().to_dict()
    del older["phase"]
    assert GateConfig.from_dict(older).phases == ("prefill",)
    assert GateConfig.from_dict(older | {"phase": "both"}).phases == ("prefill", "decode")
    with pytest.raises(ValueError, match="phase must be"):
        GateConfig.from_dict(older | {"phase": "other"})


def test_configuration_with_wrong_keys() -> None:
    with pytest.raises(ValueError, match=r"unknown gate settings \['heads'\]"):
        GateConfig.from_dict(config().to_dict() | {"heads": 3})
    with pytest.raises(ValueError, match=r"gate settings are missing \['head_dim', 'num_heads'\]"):
        GateConfig.from_dict({"num_kv_heads": 2})
