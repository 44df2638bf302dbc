"""Slices are an order of computation: scores and gradients stay those of the gate called once."""

import pytest
import torch

from seerattention.gate import AttnGate, GateConfig
from seerattention.ops.pooled_attention import pooled_attention, pooled_map
from seerattention.ops.score_blocks import chunked
from seerattention.ops.select_decode_blocks.reference import group_scores
from seerattention.ops.summarise_blocks import reference as summarise
from seerattention.policies import TopK
from seerattention.rows import Rows
from seerattention.selection import causal_blocks
from seerattention.testing.memory import LargestTensor
from seerattention.train import layer, objectives, target_recall
from seerattention.train.target import (
    LEAST_TAKEN,
    counted,
    decode_rows,
    decode_target,
    finished,
    sampled_recall,
    shown_density,
)


def inputs(tokens):
    torch.manual_seed(0)
    return torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 250])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_kv_head": True},
        {"k_sub_block": None, "q_sub_block": None},
        {"q_pool": ("max",), "k_pool": ("avg", "min"), "qk_norm": True},
    ],
)
def test_sliced_scores_and_gradients_equal_the_gates_own(tokens, settings, monkeypatch):
    monkeypatch.setattr(chunked, "SLICE_BYTES", 1)
    q, k = inputs(tokens)
    torch.manual_seed(1)
    gate = AttnGate(
        GateConfig(4, 2, 16, **{"block_size": 16, "q_sub_block": 8, "k_sub_block": 8, **settings})
    )
    expected, sliced = gate(q, k), layer.gate_scores(gate, q, k, torch.arange(tokens))["prefill"]
    causal = torch.ones(expected.shape[2:], dtype=torch.bool).tril()
    eps = 64 * torch.finfo(torch.float32).eps
    assert (expected - sliced)[:, :, causal].abs().max() <= eps * expected.abs().max()
    assert sliced.isfinite().all()
    found = []
    for scores in (expected, sliced):
        gate.zero_grad()
        scores.masked_fill(~causal, float("-inf")).logsumexp(-1).sum().backward()
        found.append([p.grad.clone() for p in gate.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= eps * a.abs().max()


@pytest.mark.parametrize("tokens", [250, 256])
@pytest.mark.parametrize("settings", [{}, {"per_kv_head": True, "phase": "both"}, {"shares": True}])
def test_scores_of_a_run_of_rows_are_those_among_all(tokens, settings):
    q, k = inputs(tokens)
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16, q_sub_block=8, k_sub_block=4, **settings))
    run, positions = Rows.at(64, min(128, tokens - 64)), torch.arange(tokens)
    whole = layer.gate_scores(gate, q, k, positions, gate.config.phases)
    found = layer.gate_scores(gate, q, k, positions, gate.config.phases, run)
    causal = run.causal((16, 16))
    expected = whole["prefill"][:, :, 4:12, :12].masked_fill(~causal, 0)
    assert torch.allclose(found["prefill"].masked_fill(~causal, 0), expected, rtol=1e-5, atol=1e-6)
    assert set(found) == set(whole)
    if "decode" in whole:
        assert torch.equal(found["decode"], whole["decode"])


def test_pools_are_the_largest_that_is_kept(monkeypatch):
    """What the backward pass keeps is a map of blocks, never one of sub-blocks."""
    monkeypatch.setattr(chunked, "SLICE_BYTES", 1)
    q, k = inputs(256)
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16, q_sub_block=2, k_sub_block=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        layer.gate_scores(gate, q, k, torch.arange(256))
    assert max(kept) == q.numel() // 2 * 3
    assert max(kept) < 2 * 4 * 128 * 128


def test_no_copy_of_all_tokens_is_made():
    gate = AttnGate(GateConfig(4, 2, 16, block_size=64, q_sub_block=32, k_sub_block=32))
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 4096, 16).bfloat16() for heads in (4, 2))
    with LargestTensor() as largest:
        layer.gate_scores(gate, q, k, torch.arange(4096))["prefill"].sum().backward()
    # Views of q itself count as well.
    assert largest.bytes <= q.numel() * q.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_pooled_once(dtype, monkeypatch):
    """Tokens get no gradient: their pools are constants, and backward does not make them again."""
    pooled = []
    run = summarise.run
    monkeypatch.setattr(summarise, "run", lambda x, *a, **b: pooled.append(x.shape[1]) or run(x, *a, **b))
    q, k = (x.to(dtype) for x in inputs(250))
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16))
    layer.gate_scores(gate, q, k, torch.arange(250))["prefill"].sum().backward()
    assert pooled == [4, 2]
    assert all(p.grad.any() for p in gate.parameters())


def test_recall_on_all_rows_is_target_recall():
    q, k = inputs(250)
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16))
    target = pooled_attention(q, k, torch.randn_like(k), (16, 16)).target
    scores = gate(q, k).detach()
    found = sampled_recall(counted(target, scores, (16, 16), 250), (0.2, 0.5))
    for density, value in zip((0.2, 0.5), found.tolist(), strict=True):
        assert value == pytest.approx(target_recall(target, scores, (16, 16), 250, density), rel=1e-6)


def test_recall_of_a_short_sequence_is_that_of_a_choice():
    """Of 32 blocks 10 % is one, which any gate finds: three are taken, and the density says so."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 32, 32, generator=generator)
    # All see the own block and the first; a third of the rest is in one block, where only some find it.
    target = torch.zeros(1, 2, 32, 32)
    rows = torch.arange(32)
    target[..., 0], target[:, :, rows, rows] = 0.4, 0.4
    target[:, :, rows, rows // 2] += 0.2
    given = 8.0 * (target > 0.3)
    poor, good = (given + right * target.clamp(max=0.2) + 0.1 * scores for right in (0, 30))
    asked = [counted(target, scores, (16, 16), 512) for scores in (poor, good)]
    assert torch.equal(*(sampled_recall(rows, (0.1,)) for rows in asked))
    found = [float(sampled_recall(rows, (0.1,), least=LEAST_TAKEN)[0]) for rows in asked]
    assert found[0] < 0.9 < found[1] == pytest.approx(1)
    valid = causal_blocks(512, 512, (16, 16))
    taken = torch.ones(32, 32, dtype=torch.bool).tril().triu(-2) & valid
    assert shown_density(0.1, 32) == pytest.approx(float(taken.sum() / valid.sum()))
    assert shown_density(0.5, 32) == pytest.approx(TopK(0.5).expected_density(32, 16))


def test_learning_reads_nothing_back_and_weights_the_gradient():
    q, k = inputs(250)
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16))
    target = pooled_attention(q, k, torch.randn_like(k), (16, 16)).target
    objective = objectives.create("kl")
    values, scores = layer.learn(gate, q, k, {"prefill": target}, objective, 0.25, 0.2)
    assert not scores["prefill"].requires_grad
    assert scores["prefill"].shape == target.shape
    loss = objective(*counted(target, gate(q, k), (16, 16), 250))
    assert float(values[0]) == pytest.approx(float(loss.detach()) / 4, rel=1e-5)
    mine = gate.linear_k.weight.grad.clone()
    gate.zero_grad()
    loss.backward()
    reference = gate.linear_k.weight.grad / 4
    eps = 64 * torch.finfo(torch.float32).eps
    assert (mine - reference).abs().max() <= eps * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "design", [{}, {"per_kv_head": True, "q_sub_block": 1, "q_pool": ("avg",)}, {"k_sub_block": None}]
)
def test_scores_of_decoding_are_those_of_single_tokens(design, dtype):
    """By the gate's view for single tokens, one after the other, merged as decoding merges them."""
    q, k = (x.to(dtype) for x in inputs(250))
    gate = AttnGate(GateConfig(4, 2, 16, **{"block_size": 16, "phase": "both", **design}))
    positions, rows = torch.arange(250), decode_rows(250)
    found = layer.gate_scores(gate, q, k, positions, gate.config.phases)
    assert torch.equal(found["prefill"], layer.gate_scores(gate, q, k, positions)["prefill"])
    single = gate.per_token()
    keys = single.compress(k, positions=positions)
    eps = 64 * torch.finfo(torch.float32 if dtype == torch.float32 else torch.bfloat16).eps
    for i in (0, 40, 100, len(rows) - 1):
        row = rows[i : i + 1]
        scores = single.score(q[:, :, row], keys, positions=row)
        expected = group_scores(scores, finished(row, 16, 16), 2)[:, :, 0]
        blocks = (int(row) + 1) // 16
        off = found["decode"][:, :, i, :blocks] - expected[..., :blocks]
        assert off.abs().max() <= eps * expected[..., :blocks].abs().max()
        assert (found["decode"][:, :, i, blocks:] == float("-inf")).all()


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_both_phases_learn_as_each_alone(per_kv_head):
    q, k = inputs(250)
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16, per_kv_head=per_kv_head))
    rows = decode_rows(250)
    targets = {
        "prefill": pooled_map(q, k, (16, 16), per_kv_head=per_kv_head),
        "decode": decode_target(q, k, rows, 16, scale=0.25),
    }
    objective, found = objectives.create("sharp_kl"), {}
    for phases in (("prefill",), ("decode",), ("prefill", "decode")):
        gate.zero_grad()
        values, _ = layer.learn(gate, q, k, {name: targets[name] for name in phases}, objective, 0.5, 0.2)
        found[phases] = values, [p.grad.clone() for p in gate.parameters()]
    (one, prefill), (two, decode), (both, together) = found.values()
    expected = [float(one[0] + two[0]), float(one[1]), float(two[1])]
    assert both.tolist() == pytest.approx(expected, rel=1e-5)
    eps = 64 * torch.finfo(torch.float32).eps
    for a, b, c in zip(prefill, decode, together, strict=True):
        assert a.any()
        assert b.any()
        assert (a + b - c).abs().max() <= eps * c.abs().max()


def test_learning_to_decode_is_the_divergence_of_the_merged_scores():
    """Against a loss written here, head by head, of gates with a score per query head."""
    q, k = inputs(100)
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16))
    rows = decode_rows(100)
    target = decode_target(q, k, rows, 16, scale=0.25)
    values, _ = layer.learn(gate, q, k, {"decode": target}, objectives.create("kl"), 1.0, 0.2)
    mine = [p.grad.clone() for p in gate.parameters()]
    gate.zero_grad()
    single = gate.per_token()
    scores = single.score(q, single.compress(k, positions=torch.arange(100)), positions=torch.arange(100))
    losses = []
    for i, row in enumerate(rows.tolist()):
        blocks = (row + 1) // 16
        share = scores[:, :, row, :blocks].softmax(-1)
        merged = torch.stack([share[:, 0:2].amax(1), share[:, 2:4].amax(1)], 1)
        predicted, true = merged / merged.sum(-1, keepdim=True), target[:, :, i, :blocks]
        losses.append((true * (true / predicted).log()).sum(-1).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert float(values[0]) == pytest.approx(float(loss.detach()), rel=1e-4)
    for a, p in zip(mine, gate.parameters(), strict=True):
        assert (a - p.grad).abs().max() <= 1e-4 * a.abs().max()
