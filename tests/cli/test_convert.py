"""``seerattention convert``: what it prints and writes, and that it leaves nothing behind."""

import json

import pytest
import torch
from typer.testing import CliRunner

from seerattention import cli
from seerattention.hosts.transformers import load_gates

HEADS, KV_HEADS, DIM = 4, 2, 16
KEY = "model.layers.{}.self_attn.attn_gate.{}.weight"
CONFIG = {
    "base_model": "someone/Tiny-Qwen",
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "seerattn_gate_block_size": 64,
    "seerattn_gate_hidden_size": DIM,
}
SHAPES = {
    "prefill": {"mask_linear_k": (HEADS, 3 * DIM, DIM)},
    "decode": {
        "attngate_linear_q": (KV_HEADS, HEADS // KV_HEADS, DIM, DIM),
        "attngate_linear_k": (KV_HEADS, 3 * DIM, DIM),
        "attngate_qnorm": (DIM,),
        "attngate_knorm": (DIM,),
    },
}


def published(folder, kind="prefill", dtype=torch.bfloat16, **settings):
    """A folder in the published layout."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **settings}))
    weights = {KEY.format(i, n): torch.randn(s).to(dtype) for i in (0, 1) for n, s in SHAPES[kind].items()}
    torch.save(weights, folder / "attn_gate_weights.pth")
    return folder


def convert(*arguments):
    return CliRunner().invoke(cli.app(), ["convert", *map(str, arguments)])


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (
            "prefill",
            {"seerattn_threshold": 5e-4},
            ["prefill, one score per query head", "linear_k.weight [4, 48, 16]", "0.0005,dense_last_rows=2"],
        ),
        (
            "decode",
            {"seerattn_sparsity_method": "token_budget"},
            ["decode, one score per KV head", "linear_q.weight [2, 32, 16]", "token_budget:4096"],
        ),
        ("prefill", {}, ["policy      none saved; give attach one"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_says_what_it_writes(tmp_path, kind, settings, words, dtype):
    source = published(tmp_path / "published", kind, dtype, **settings)
    result = convert(source, tmp_path / "gates")
    assert result.exit_code == 0, result.output
    for word in [*words, "for someone/Tiny-Qwen", "layers      2,", "blocks of 64 tokens", str(dtype)]:
        assert word in result.output
    assert str(tmp_path / "gates") in result.output
    assert sorted(p.name for p in (tmp_path / "gates").iterdir()) == ["config.json", "gates.safetensors"]
    before, after = load_gates(source), load_gates(tmp_path / "gates")
    assert (after.config, after.base, after.policy) == (before.config, before.base, before.policy)
    assert after.decode_policy == before.decode_policy
    for key, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[key], value)
        assert after.state_dict()[key].dtype == dtype


def test_a_policy_of_ones_own(tmp_path):
    source = published(tmp_path / "published")
    result = convert(source, tmp_path / "gates", "--policy", "top_k:0.10,dense_last_rows=2")
    assert "policy      top_k:0.1,dense_last_rows=2" in result.output
    assert load_gates(tmp_path / "gates").policy == "top_k:0.1,dense_last_rows=2"
    again = convert(source, tmp_path / "gates", "--policy", "threshold:0.002")
    assert again.exit_code == 0, again.output
    assert load_gates(tmp_path / "gates").policy == "threshold:0.002"


def test_a_policy_of_decode_gates_is_for_decoding(tmp_path):
    source = published(tmp_path / "published", "decode")
    result = convert(source, tmp_path / "gates", "--policy", "token_budget:1024")
    assert "policy      token_budget:1024" in result.output
    gates = load_gates(tmp_path / "gates")
    assert (gates.policy, gates.decode_policy) == (None, "token_budget:1024")
    refused = convert(source, tmp_path / "other", "--policy", "top_k:0.1")
    assert refused.exit_code == 2
    assert "top_k:0.1 is a share of a whole prompt" in refused.output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (lambda s: None, ["--policy", "best:3"], "unknown policy 'best:3'"),
        (lambda s: (s / "attn_gate_weights.pth").write_bytes(b"PK"), [], "not executed"),
        (lambda s: (s / "attn_gate_weights.pth").unlink(), [], "holds published settings but no attn_gate"),
        (lambda s: (s / "config.json").unlink(), [], "holds no config.json"),
    ],
)
def test_a_failure_is_one_sentence_and_writes_nothing(tmp_path, change, more, words):
    source = published(tmp_path / "published")
    change(source)
    result = convert(source, tmp_path / "gates", *more)
    assert result.exit_code == 2
    message = " ".join(result.output.split())
    assert message.count("error:") == 1
    assert "Traceback" not in message
    assert words in message
    assert [p.name for p in tmp_path.iterdir()] == ["published"]


def test_the_source_is_never_replaced(tmp_path):
    source = published(tmp_path / "published")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    result = convert(source, source)
    assert result.exit_code == 2
    assert "holds other files than gates" in " ".join(result.output.split())
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_help_names_what_it_reads_and_its_default():
    text = convert("--help").output.lower()
    for word in ("attn_gate_weights.pth", "source", "target", "--policy", "default the one"):
        assert word in text
