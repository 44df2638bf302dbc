"""When prefill is dense: a written-down table decides by length and density, and says where from."""

import json

import pytest
import torch
import torch.nn.functional as F

from seerattention import baselines
from seerattention import crossover as crossovers
from seerattention.crossover import Crossover, nearest, read_table
from seerattention.engine import layer as engine_layer
from seerattention.hosts import transformers as host
from seerattention.ops.dense_attention import cudnn_first, dense_attention

ENTRIES = [
    {"device_type": "cpu", "device": "Intel Xeon", "dense_below": 7, "rows": []},
    {
        "device_type": "cuda",
        "device": "NVIDIA H200",
        "capability": "9.0",
        "dense_below": 4096,
        "cudnn_from": 8192,
        "rows": [{"tokens": 1024, "densest": 0.2}, {"tokens": 4096, "densest": 0.6}],
    },
    {
        "device_type": "cuda",
        "device": "NVIDIA A100-SXM4-80GB",
        "capability": "8.0",
        "dense_below": 8192,
        "rows": [],
    },
]


def test_a_device_finds_its_entry_or_the_one_most_like_it():
    own = nearest(ENTRIES, "cuda", "NVIDIA H200", "9.0")
    assert (own.dense_below, own.cudnn_from, own.source) == (4096, 8192, "measured on NVIDIA H200")
    like = nearest(ENTRIES, "cuda", "NVIDIA H100 80GB HBM3", "9.0")
    assert like.dense_below == 4096
    assert like.source == "measured on NVIDIA H200, the nearest known to NVIDIA H100 80GB HBM3"
    assert nearest(ENTRIES, "cuda", "NVIDIA A100-PCIE-40GB", "8.0").dense_below == 8192
    assert nearest(ENTRIES, "cpu", "Apple M4").device == "Intel Xeon"
    assert nearest([], "cpu", "Apple M4") == Crossover(None, 0)
    guess = nearest([{"device_type": "cuda", "device": None, "dense_below": 9, "rows": []}], "cuda", "X")
    assert guess.source == "a guess, not measured on this kind of device"


@pytest.mark.parametrize(
    ("tokens", "densest"), [(1, 0.2), (1024, 0.2), (2048, 0.4), (4096, 0.6), (100000, 0.6)]
)
def test_densities_between_lengths(tokens, densest):
    known = Crossover("X", 0, ((1024, 0.2), (4096, 0.6)))
    assert known.densest_at(tokens) == pytest.approx(densest)
    assert Crossover("X", 0).densest_at(tokens) == 1


def test_the_table_that_ships_can_be_read(tmp_path):
    entries = read_table()
    assert {entry["device_type"] for entry in entries} >= {"cpu", "cuda"}
    for entry in entries:
        known = nearest(entries, entry["device_type"], entry["device"] or "")
        assert known.dense_below >= 0
        assert list(known.densest) == sorted(known.densest)
    assert read_table(tmp_path / "none.json") == []


@pytest.fixture
def table(monkeypatch):
    """A table for this machine: dense below 64 tokens, and above 40 % at any length."""
    known = Crossover("an abacus", 64, ((16, 0.4), (1024, 0.4)))
    monkeypatch.setattr(engine_layer, "crossover", lambda kind: known)


def used(tiny, policy, length, **options):
    model = tiny.make()
    host.attach(model, tiny.gates_for(model), policy, **options)
    tiny.logits(model, tiny.tokens(1, length))
    return host.usage(model)


def test_length_decides(tiny, table):
    reason = "dense: fewer than 64 tokens (measured on an abacus)"
    assert used(tiny, "threshold:0.01", 63) == {reason: 2}
    assert used(tiny, "threshold:0.01", 64) == {"sparse": 2}


def test_density_decides_where_the_policy_knows_it(tiny, table):
    # 20 blocks: everything, 2 of at most 20, and 18 of them.
    reason = "dense: the policy reads {}, dense is faster from 40% (measured on an abacus)"
    assert used(tiny, "top_k:1", 320) == {reason.format("100%"): 2}
    assert used(tiny, "top_k:0.2", 320) == {"sparse": 2}
    assert used(tiny, "token_budget:300", 320) == {reason.format("99%"): 2}
    assert used(tiny, "top_p:1", 320) == {"sparse": 2}


def test_min_tokens_overrules_the_table(tiny, table):
    assert used(tiny, "top_k:1", 40, min_tokens=0) == {"sparse": 2}
    assert used(tiny, "top_k:1", 40, min_tokens=41) == {"dense: fewer than 41 tokens": 2}


def test_later_pieces_go_by_length_alone(tiny, table):
    from transformers import DynamicCache

    model = tiny.make()
    host.attach(model, baselines.create("meanpool", block_size=(16, 16)), "top_k:1")
    cache = DynamicCache(config=model.config)
    for piece in tiny.tokens(1, 128).split(64, 1):
        tiny.logits(model, piece, cache=cache)
    assert host.usage(model)["sparse"] == 2


def test_info_shows_the_table(monkeypatch):
    from seerattention.cli.info import crossover_lines

    known = Crossover("an abacus", 64, ((1024, 0.4),), asked="a slide rule")
    monkeypatch.setattr(crossovers, "crossover", lambda kind: known)
    text = "\n".join(crossover_lines())
    assert "below 64 tokens" in text
    assert "measured on an abacus, the nearest known to a slide rule" in text
    assert "1,024: 40%" in text


def test_the_installed_table_is_json():
    assert json.loads(crossovers.TABLE.read_text())


def test_cudnn_first_is_dense_attention_also_compiled():
    q, k, v = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(dense_attention(q, k, v, scale=0.25), expected)
    assert torch.allclose(cudnn_first(q, k, v, scale=0.25), expected)
    compiled = torch.compile(cudnn_first, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v, scale=0.25), expected)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    cudnn_first(q, k, v, scale=0.25)
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled())


def test_the_length_for_cudnn_is_a_constant_to_the_compiler(monkeypatch):
    known = Crossover("X", 0, cudnn_from=12)
    monkeypatch.setattr(crossovers, "crossover", lambda kind: known)

    def longer(x):
        return x + 1 if x.shape[0] >= (crossovers.cudnn_from() or 0) else x - 1

    compiled = torch.compile(longer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(12)), torch.ones(12))
