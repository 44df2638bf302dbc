"""Published gates score and choose as the published formulas, written here a second time."""

import math

import pytest
import torch

from seerattention.hosts import transformers as host
from seerattention.ops.select_decode_blocks import select_decode_blocks
from seerattention.policies import parse
from seerattention.testing.budget import Budget
from tests.hosts.transformers.published import (
    BLOCK,
    DECODE,
    DIM,
    DTYPES,
    HEADS,
    KEY,
    KV_HEADS,
    PREFILL,
    THETA,
    decode,
    pools_of,
    prefill,
    weights_of,
    write,
)


def pooled(x, pools):
    """``[T, H, D]`` -> ``[N, H, pools * D]``, one block at a time."""
    rows = []
    for block in x.split(BLOCK):
        parts = {"max": block.max(0).values, "min": block.min(0).values, "avg": block.mean(0)}
        rows.append(torch.cat([parts[name] for name in pools], -1))
    return torch.stack(rows)


def turned(x, positions):
    """Rotate ``[N, H, E]``: each pair (i, i + E/2) by position * theta ** (-2i / E), angles in fp32."""
    half = x.shape[-1] // 2
    angle = (positions.float()[:, None] * (1 / THETA ** (torch.arange(half) / half)))[:, None]
    cos, sin = angle.cos().to(torch.promote_types(x.dtype, torch.float32)), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def normed(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return wide.to(x.dtype) * weight


def dot(q, k):
    """Scores ``[H, Nq, Nk]`` of summaries ``[N, H, E]``, fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("ihe,jhe->hij", q.to(wide), k.to(wide)) / math.sqrt(q.shape[-1])


def prefill_scores(gate_type, q, k, wk, wq=None):
    """q ``[T, Hq, D]``, k ``[T, Hk, D]`` -> ``[Hq, N, N]``."""
    q_pools, k_pools = map(pools_of, gate_type.split("_"))
    pool_q, pool_k = pooled(q, q_pools), pooled(k, k_pools)
    if wq is None:
        gate_q = pool_q
        gate_k = torch.einsum("nhi,hio->nho", pool_k.repeat_interleave(HEADS // KV_HEADS, 1), wk)
    else:
        gate_q = torch.einsum("nhi,hio->nho", pool_q, wq)
        gate_k = torch.einsum("nhi,hio->nho", pool_k, wk).repeat_interleave(HEADS // KV_HEADS, 1)
    starts = torch.arange(len(gate_k)) * BLOCK
    return dot(turned(gate_q, starts), turned(gate_k, starts))


def decode_scores(k_pools, q, k, wk, wq, nq=None, nk=None):
    """Each query of ``[T, Hq, D]`` at its own position, keys ``[T, Hk, D]`` -> ``[Hk, T, N]``."""
    return dot(*projected(k_pools, q, k, wk, wq, nq, nk))


def projected(k_pools, q, k, wk, wq, nq=None, nk=None):
    """A group's queries merged, and the summaries of blocks of keys: ``[T, Hk, E]`` and ``[N, Hk, E]``."""
    gate_q = torch.einsum("skgi,kgio->sko", q.unflatten(1, (KV_HEADS, -1)), wq)
    gate_k = torch.einsum("nhi,hio->nho", pooled(k, pools_of(k_pools)), wk)
    if nq is not None:
        gate_q, gate_k = normed(gate_q, nq), normed(gate_k, nk)
    gate_q = turned(gate_q, torch.arange(len(gate_q)))
    return gate_q, turned(gate_k, torch.arange(len(gate_k)) * BLOCK)


def queries_and_keys(tokens, dtype):
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(tokens, HEADS, DIM, generator=generator).to(dtype)
    k = torch.randn(tokens, KV_HEADS, DIM, generator=generator).to(dtype)
    return q, k


def check(actual, formula, *inputs):
    """To 1e-5 of the formula in fp64 where inputs are fp32, within the error budget where bf16."""
    if inputs[0].dtype == torch.float32:
        gold = formula(*(x.double() for x in inputs))
        assert actual.dtype == torch.float32
        assert (actual - gold).abs().max() <= 1e-5 * max(1, float(gold.abs().max()))
        return
    Budget.of(formula, *inputs).check(actual)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [BLOCK * 6, BLOCK * 4 + 5, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("design", PREFILL)
def test_prefill_gates_score_as_the_published_formula(tmp_path, design, dtype, tokens):
    config = prefill(design)
    weights = weights_of(config, dtype)
    gates = host.load_gates(write(tmp_path / "gates", config, weights))
    q, k = queries_and_keys(tokens, dtype)
    assert [index for index, _ in gates.items()] == [0, 1]
    for layer, gate in gates.items():
        names = [KEY.format(layer, f"mask_linear_{x}") for x in "kq"]
        inputs = [weights[name] for name in names if name in weights]
        actual = gate(q.transpose(0, 1)[None], k.transpose(0, 1)[None])[0]
        check(actual, lambda *x: prefill_scores(config["seerattn_gate_type"], *x), q, k, *inputs)


def decoded(gate, q, k):
    """Score one query after the other, as decoding does: ``[Hk, T, N]``."""
    k_blocks = gate.compress(k.transpose(0, 1)[None], positions=torch.arange(len(k)))
    queries = enumerate(q.transpose(0, 1)[None].split(1, 2))
    return torch.cat([gate.score(one, k_blocks, positions=torch.tensor([t])) for t, one in queries], 2)[0]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [BLOCK * 6, BLOCK * 4 + 5, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("design", DECODE)
def test_decode_gates_score_as_the_published_formula(tmp_path, design, dtype, tokens):
    config = decode(design)
    weights = weights_of(config, dtype)
    gates = host.load_gates(write(tmp_path / "gates", config, weights))
    q, k = queries_and_keys(tokens, dtype)
    names = ["linear_k", "linear_q", *(["qnorm", "knorm"] if config["seerattn_use_qk_norm"] else [])]
    for layer, gate in gates.items():
        inputs = [weights[KEY.format(layer, f"attngate_{name}")] for name in names]
        actual = decoded(gate, q, k)
        assert actual.shape[:2] == (KV_HEADS, tokens)
        check(actual, lambda *x: decode_scores(config["seerattn_k_seq_pooling_type"], *x), q, k, *inputs)


def chosen(gate_q, gate_k, policy):
    """Blocks that the published code reads, one query after the other, as bool ``[Hk, T, N]``.

    A finished block takes part in the softmax; the block that is being filled is read anyway, and counts
    towards a budget.
    """
    tokens, blocks = len(gate_q), len(gate_k)
    mask = torch.zeros(KV_HEADS, tokens, blocks, dtype=torch.bool)
    name, _, value = policy.partition(":")
    for t in range(tokens):
        finished = (t + 1) // BLOCK
        scores = dot(gate_q[t : t + 1], gate_k[:finished])[:, 0]
        mask[:, t, t // BLOCK] = True
        for h in range(KV_HEADS):
            if name == "threshold":
                share = scores[h].softmax(-1)
                mask[h, t, :finished] |= share > float(value)
            else:
                order = [j for j in scores[h].argsort(descending=True).tolist() if j != t // BLOCK]
                mask[h, t, order[: int(value) // BLOCK - 1]] = True
    return mask


@torch.no_grad()
@pytest.mark.parametrize("tokens", [BLOCK * 6, BLOCK * 4 + 5, 7])
@pytest.mark.parametrize("policy", ["threshold:0.2", f"token_budget:{3 * BLOCK}"])
@pytest.mark.parametrize("design", DECODE)
def test_decode_gates_choose_as_the_published_formula(tmp_path, design, policy, tokens):
    """All tokens in one call, by the view of the gate for single tokens."""
    config = decode(design)
    weights = weights_of(config)
    gate = dict(host.load_gates(write(tmp_path / "gates", config, weights)).items())[1]
    q, k = queries_and_keys(tokens, torch.float32)
    names = ["linear_k", "linear_q", *(["qnorm", "knorm"] if config["seerattn_use_qk_norm"] else [])]
    wk, wq, *norms = (weights[KEY.format(1, f"attngate_{name}")].double() for name in names)
    scorer = gate.per_token()
    heads, keys = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    found = select_decode_blocks(
        heads,
        scorer.compress(keys, positions=torch.arange(tokens)),
        scorer,
        parse(policy),
        lengths=torch.tensor([tokens], dtype=torch.int32),
        num_keys=tokens,
        kv_heads=KV_HEADS,
    )
    gate_q, gate_k = projected(config["seerattn_k_seq_pooling_type"], q.double(), k.double(), wk, wq, *norms)
    assert torch.equal(found.to_mask()[0], chosen(gate_q, gate_k, policy))


@torch.no_grad()
def test_decode_gates_give_a_block_of_queries_the_best_score_of_its_queries(tmp_path):
    gate = dict(host.load_gates(write(tmp_path / "gates", decode())).items())[0]
    q, k = queries_and_keys(BLOCK * 3 + 2, torch.float32)
    best = torch.stack([part.amax(1) for part in decoded(gate, q, k).split(BLOCK, 1)], 1)
    torch.testing.assert_close(gate(q.transpose(0, 1)[None], k.transpose(0, 1)[None])[0], best)
