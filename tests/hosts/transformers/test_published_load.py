"""Published gates are read as they are: weights, settings, policies, by a folder or a name on the Hub."""

import pytest
import torch

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers import checkpoint
from tests.hosts.transformers.published import (
    DIM,
    DTYPES,
    HEADS,
    KEY,
    KV_HEADS,
    decode,
    prefill,
    weights_of,
    write,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [prefill("default"), prefill("forced"), decode()])
def test_weights_are_kept_as_stored(tmp_path, config, dtype):
    weights = weights_of(config, dtype)
    gates = host.load_gates(write(tmp_path / "gates", config, weights))
    stored = sorted(float(x.double().sum()) for x in weights.values())
    assert sorted(float(x.double().sum()) for x in gates.state_dict().values()) == pytest.approx(stored)
    assert {x.dtype for x in gates.parameters()} == {dtype}
    group = HEADS // KV_HEADS
    if "seerattn_gate_type" not in config:
        expected = weights[KEY.format(1, "attngate_linear_q")].reshape(KV_HEADS, group * DIM, DIM)
        assert torch.equal(gates.state_dict()["layers.1.linear_q.weight"], expected)


def test_loading_leaves_the_random_generator_alone_and_shares_no_memory(tmp_path):
    weights = weights_of(prefill())
    # The second layer's tensor is the first one's.
    first, second = (KEY.format(i, "mask_linear_k") for i in (0, 1))
    weights[second] = weights[first]
    state = torch.get_rng_state()
    gates = host.load_gates(write(tmp_path / "gates", prefill(), weights))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.is_contiguous() and p.device.type == "cpu" for p in gates.parameters())
    with torch.no_grad():
        gates.layers["0"].linear_k.weight.zero_()
    assert torch.equal(gates.layers["1"].linear_k.weight, weights[second])


def test_weights_of_two_precisions_are_widened(tmp_path):
    weights = weights_of(decode(), torch.bfloat16)
    norm = KEY.format(0, "attngate_qnorm")
    weights[norm] = weights[norm].float() + 1e-6
    gates = host.load_gates(write(tmp_path / "gates", decode(), weights))
    assert torch.equal(gates.state_dict()["layers.0.norm_q.weight"], weights[norm])
    assert {x.dtype for x in gates.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        (prefill(), "threshold:0.0005,dense_last_rows=2"),
        (prefill() | {"seerattn_last_block_dense": False}, "threshold:0.0005"),
        (
            prefill() | {"seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.1},
            "top_k:0.1,dense_last_rows=2",
        ),
        (prefill(seerattn_threshold=0.0), None),
        (prefill(seerattn_threshold=...), None),
        (prefill(seerattn_sparsity_method="nz_ratio"), None),
        (decode(), "threshold:0.0005"),
        (decode(seerattn_sparsity_method="token_budget", seerattn_token_budget=2048), "token_budget:2048"),
        (decode(seerattn_sparsity_method="token_budget"), "token_budget:4096"),
        (decode(seerattn_sparsity_method=..., seerattn_threshold=...), None),
    ],
)
def test_settings_become_the_policy_of_the_gates_phase(tmp_path, config, policy):
    gates = host.load_gates(write(tmp_path / "gates", config))
    decodes = "seerattn_gate_type" not in config
    assert gates.config.phase == ("decode" if decodes else "prefill")
    assert (gates.policy, gates.decode_policy) == ((None, policy) if decodes else (policy, None))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": None}, ("num_kv_heads", HEADS)),
        ({"head_dim": None}, ("head_dim", DIM)),
        ({"rope_theta": 5e5}, ("rope_theta", 5e5)),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 1e6}}, ("rope_theta", 1e6)),
        ({"rope_theta": ...}, ("rope_theta", 10000.0)),
    ],
)
def test_the_base_models_own_settings(tmp_path, changes, expected):
    gates = host.load_gates(write(tmp_path / "gates", prefill(**changes)))
    assert getattr(gates.config, expected[0]) == expected[1]


def test_decode_settings_that_early_files_lack(tmp_path):
    config = decode()
    weights = weights_of(config)
    for name in ("seerattn_use_qk_norm", "seerattn_q_head_pooling_type", "seerattn_k_seq_pooling_type"):
        config.pop(name)
    gates = host.load_gates(write(tmp_path / "gates", config, weights))
    assert gates.config.qk_norm
    assert gates.config.rope
    assert gates.config.k_pool == ("max", "min", "avg")
    off = host.load_gates(write(tmp_path / "gates", config | {"seerattn_use_rope": False}, weights))
    assert not off.config.rope


def test_hub_id(tmp_path, monkeypatch):
    folder, asked = write(tmp_path / "gates", prefill()), []

    def download(name, *, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    gates = host.load_gates("SeerAttention/Some-AttnGates")
    assert gates.base.name == "someone/Tiny-Llama"
    assert asked == [
        (
            "SeerAttention/Some-AttnGates",
            ["attn_gate_weights.pth", "calibration.json", "config.json", "gates.safetensors"],
        )
    ]


def test_our_layout_wins_where_both_are(tmp_path):
    folder = write(tmp_path / "published", prefill())
    host.save_gates(host.load_gates(folder), tmp_path / "ours", policy="top_k:0.5")
    (tmp_path / "ours" / "attn_gate_weights.pth").write_bytes(b"anything")
    assert host.load_gates(tmp_path / "ours").policy == "top_k:0.5"
