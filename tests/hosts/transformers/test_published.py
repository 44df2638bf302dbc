"""The published layout: scores as the published formula, exact reading, one sentence for every refusal."""

import json
import math
import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers import checkpoint
from seerattention.ops.select_decode_blocks import select_decode_blocks
from seerattention.policies import parse
from seerattention.testing.budget import Budget

HEADS, KV_HEADS, DIM, LAYERS, BLOCK, THETA = 4, 2, 16, 2, 16, 10000.0
KEY = "model.layers.{}.self_attn.attn_gate.{}.weight"
DTYPES = [torch.float32, torch.bfloat16]

#: Pools of q, gate dimension, force_double.
PREFILL = {
    "default": ("Qavg_Kmaxminavg", DIM, False),
    "two-q-pools": ("Qmaxmin_Kmaxminavg", DIM, False),
    "other-gate-dim": ("Qavg_Kmaxminavg", 24, False),
    "forced": ("Qavg_Kmaxavg", DIM, True),
}
#: Pools of k, gate dimension, whether summaries are normalised.
DECODE = {
    "default": ("Kmaxminavg", DIM, True),
    "other-gate-dim": ("Kmaxminavg", 24, True),
    "two-k-pools-no-norm": ("Kmaxavg", DIM, False),
}


def settings(**changes):
    """What the published code writes into config.json: the base model's configuration and more."""
    config = {
        "base_model": "someone/Tiny-Llama",
        "model_type": "llama",
        "hidden_size": HEADS * DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rope_theta": THETA,
        "vocab_size": 97,
        "seerattn_gate_block_size": BLOCK,
        "seerattn_gate_hidden_size": DIM,
        "seerattn_sparsity_method": "threshold",
        "seerattn_threshold": 5e-4,
    }
    return {k: v for k, v in {**config, **changes}.items() if v is not ...}


def prefill(design="default", **changes):
    gate_type, dim, force = PREFILL[design]
    return settings(
        seerattn_gate_type=gate_type,
        seerattn_gate_hidden_size=dim,
        seerattn_gate_force_double=force,
        seerattn_nz_ratio=1.0,
        seerattn_last_block_dense=True,
        **changes,
    )


def decode(design="default", **changes):
    pools, dim, normed = DECODE[design]
    return settings(
        seerattn_k_seq_pooling_type=pools,
        seerattn_q_head_pooling_type="Qproj",
        seerattn_gate_hidden_size=dim,
        seerattn_use_qk_norm=normed,
        **changes,
    )


def pools_of(text):
    return [name for name in ("max", "min", "avg") if name in text]


def weights_of(config, dtype=torch.float32):
    """Random weights in the published keys and shapes."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[-2])).to(dtype)

    dim, weights = config["seerattn_gate_hidden_size"], {}
    for layer in range(config["num_hidden_layers"]):
        if "seerattn_gate_type" in config:
            q_pools, k_pools = map(pools_of, config["seerattn_gate_type"].split("_"))
            double = len(q_pools) > 1 or dim != DIM or config["seerattn_gate_force_double"]
            if double:
                weights[KEY.format(layer, "mask_linear_q")] = random(HEADS, len(q_pools) * DIM, dim)
            heads = KV_HEADS if double else HEADS
            weights[KEY.format(layer, "mask_linear_k")] = random(heads, len(k_pools) * DIM, dim)
            continue
        k_width = len(pools_of(config["seerattn_k_seq_pooling_type"])) * DIM
        weights[KEY.format(layer, "attngate_linear_q")] = random(KV_HEADS, HEADS // KV_HEADS, DIM, dim)
        weights[KEY.format(layer, "attngate_linear_k")] = random(KV_HEADS, k_width, dim)
        if config["seerattn_use_qk_norm"]:
            weights[KEY.format(layer, "attngate_qnorm")] = 1 + random(1, dim)[0] / 4
            weights[KEY.format(layer, "attngate_knorm")] = 1 + random(1, dim)[0] / 4
    return weights


def write(folder, config, weights=None, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = weights_of(config, dtype) if weights is None else weights
    torch.save(weights, folder / "attn_gate_weights.pth")
    return folder


def edit(folder, change):
    """Change the weights of a folder in place."""
    weights = torch.load(folder / "attn_gate_weights.pth", weights_only=True)
    change(weights)
    torch.save(weights, folder / "attn_gate_weights.pth")


# --- the published formulas, written a second time ----------------------------------------------------


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


# --- on a model ---------------------------------------------------------------------------------------


def named(model, name):
    model.config._name_or_path = name
    return model


@pytest.mark.parametrize("config", [prefill(), prefill("two-q-pools"), prefill("other-gate-dim")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_attach_in_one_line(tiny, tmp_path, config, dtype):
    model = named(tiny.make(), "someone/Tiny-Llama").to(dtype)
    ids = tiny.tokens(2, 70)
    dense = tiny.logits(model, ids)
    folder = write(tmp_path / "gates", config | {"seerattn_threshold": 0.3}, dtype=dtype)
    host.attach(model, host.load_gates(folder), min_tokens=0)
    assert not torch.equal(tiny.logits(model, ids), dense)
    assert host.usage(model) == {"sparse": 2}
    host.detach(model)
    assert torch.equal(tiny.logits(model, ids), dense)


@pytest.mark.parametrize(
    "name",
    [
        "someone/Tiny-Llama",
        "elsewhere/tiny-llama",
        "/data/models/Tiny-Llama/",
        "C:\\models\\Tiny-Llama",
        "/root/.cache/hub/models--someone--Tiny-Llama/snapshots/0123abcd",
        "",
    ],
)
def test_the_base_model_is_told_by_its_name(tiny, tmp_path, name):
    gates = host.load_gates(write(tmp_path / "gates", prefill()))
    host.attach(named(tiny.make(), name), gates)


def test_another_base_model_is_refused(tiny, tmp_path):
    gates = host.load_gates(write(tmp_path / "gates", prefill()))
    model = named(tiny.make(), "someone/Tiny-Llama-Chat")
    with pytest.raises(
        ValueError, match=r"made for someone/Tiny-Llama, not for someone/Tiny-Llama-Chat: its"
    ) as e:
        host.attach(model, gates)
    assert "its name is Tiny-Llama-Chat, not Tiny-Llama" in str(e.value)
    assert "check_base=False" in str(e.value)
    assert not host.attached(model)
    host.attach(model, gates, check_base=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "num_layers is 3, not 2"),
        ({"num_attention_heads": 8, "head_dim": DIM}, "num_heads is 8, not 4"),
        ({"num_key_value_heads": 4}, "num_kv_heads is 4, not 2"),
        ({"head_dim": 32}, "head_dim is 32, not 16"),
    ],
)
@pytest.mark.parametrize("check_base", [True, False])
def test_another_shape_is_refused_whatever_the_name(tiny, tmp_path, changes, words, check_base):
    gates = host.load_gates(write(tmp_path / "gates", prefill()))
    model = named(tiny.make(**changes), "someone/Tiny-Llama")
    with pytest.raises(ValueError, match=words):
        host.attach(model, gates, check_base=check_base)


def test_another_family_is_refused(tiny, tmp_path):
    gates = host.load_gates(write(tmp_path / "gates", prefill()))
    with pytest.raises(ValueError, match="model_type is qwen2, not llama"):
        host.attach(named(tiny.make("qwen2"), "someone/Tiny-Llama"), gates, check_base=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [prefill(), prefill("two-q-pools"), decode()])
def test_saved_in_our_layout_they_are_the_same(tiny, tmp_path, config, dtype):
    gates = host.load_gates(write(tmp_path / "published", config, dtype=dtype))
    host.save_gates(gates, tmp_path / "ours")
    back = host.load_gates(tmp_path / "ours")
    assert (back.config, back.base, back.policy) == (gates.config, gates.base, gates.policy)
    assert back.decode_policy == gates.decode_policy
    for key, value in gates.state_dict().items():
        assert back.state_dict()[key].dtype == dtype
        assert torch.equal(back.state_dict()[key], value)
    with pytest.raises(ValueError, match="its name is other, not Tiny-Llama"):
        host.attach(named(tiny.make(), "someone/other"), back)


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


# --- refusals: one sentence each ----------------------------------------------------------------------


def refusal(folder, kind=ValueError):
    with pytest.raises(kind) as error:
        host.load_gates(folder)
    message = str(error.value)
    assert "\n" not in message
    assert ". " not in message.replace("e.g. ", "")
    return message


BOTH = pytest.mark.parametrize(
    ("config", "name"),
    [(prefill(), "mask_linear_k"), (decode(), "attngate_knorm")],
    ids=["prefill", "decode"],
)


@BOTH
def test_missing_key(tmp_path, config, name):
    folder = write(tmp_path / "gates", config)
    edit(folder, lambda w: w.pop(KEY.format(1, name)))
    assert f"has 1 missing gate keys, the first is {KEY.format(1, name)}; " in refusal(folder)


@BOTH
def test_extra_key(tmp_path, config, name):
    folder = write(tmp_path / "gates", config)
    edit(folder, lambda w: w.update({KEY.format(2, name): w[KEY.format(1, name)]}))
    assert f"has 1 extra gate keys, the first is {KEY.format(2, name)}; " in refusal(folder)


@BOTH
def test_misshapen_key(tmp_path, config, name):
    folder = write(tmp_path / "gates", config)
    edit(folder, lambda w: w.update({KEY.format(0, name): torch.zeros(2, 3)}))
    message = refusal(folder)
    assert f"{KEY.format(0, name)} in " in message
    assert " is [2, 3], its configuration needs [" in message


def test_queries_merged_in_another_layout_are_misshapen(tmp_path):
    folder, key = write(tmp_path / "gates", decode()), KEY.format(0, "attngate_linear_q")
    edit(folder, lambda w: w.update({key: w[key].flatten(1, 2)}))
    assert "is [2, 32, 16], its configuration needs [2, 2, 16, 16]" in refusal(folder)


def test_a_gate_too_large_for_memory_is_refused_before_it_is_made(tmp_path):
    for name, size, said in (
        ("seerattn_gate_hidden_size", 2**16, "gate keys"),
        ("seerattn_gate_hidden_size", 2**40, "gate_dim must be at most 65,536"),
        ("num_hidden_layers", 10**9, "gates are for 1 to 1,000 layers"),
    ):
        folder = write(tmp_path / f"{name} {size}", prefill() | {name: size}, weights_of(prefill()))
        assert said in refusal(folder)


def test_settings_that_the_weights_contradict(tmp_path):
    weights = weights_of(prefill("forced"))
    folder = write(tmp_path / "gates", prefill(seerattn_gate_block_size=64), weights)
    assert "2 extra gate keys" in refusal(folder)
    folder = write(tmp_path / "gates", decode() | {"seerattn_use_qk_norm": False}, weights_of(decode()))
    assert "4 extra gate keys" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"seerattn_gate_block_size": 48},
            "seerattn_gate_block_size is 48, published gates have one of 16, 32",
        ),
        ({"seerattn_gate_block_size": 0}, "seerattn_gate_block_size is 0"),
        ({"seerattn_gate_block_size": "wide"}, "seerattn_gate_block_size is 'wide'"),
        ({"seerattn_gate_block_size": ...}, "it lacks 'seerattn_gate_block_size'"),
        ({"seerattn_gate_hidden_size": ...}, "it lacks 'seerattn_gate_hidden_size'"),
        ({"seerattn_gate_hidden_size": 15}, "even gate_dim, got 15"),
        ({"seerattn_gate_hidden_size": "wide"}, "gate_dim must be a whole number >= 1, got 'wide'"),
        ({"base_model": ...}, "it lacks 'base_model'"),
        ({"base_model": 3}, "base_model must be the name of a model, got 3"),
        ({"base_model": ""}, "base_model must be the name of a model"),
        ({"model_type": ...}, "it lacks 'model_type'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number >= 1, got 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a whole number >= 1, got '4'"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"rope_theta": ..., "rope_parameters": [1]}, "no attribute 'get'"),
        ({"seerattn_sparsity_method": "best"}, "seerattn_sparsity_method is 'best', not threshold, nz_ratio"),
        ({"seerattn_threshold": 2.0}, "threshold must be in [0, 1), got 2.0"),
        ({"seerattn_threshold": None}, "float() argument"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, changes, words):
    config = {k: v for k, v in (prefill() | changes).items() if v is not ...}
    message = refusal(write(tmp_path / "gates", config, weights_of(prefill())))
    assert message.startswith("the settings of the published gates in ")
    assert words in message
    assert message.endswith("; download the gates again")


def test_gate_types_that_cannot_be_used(tmp_path):
    weights = weights_of(prefill())
    message = refusal(write(tmp_path / "a", prefill() | {"seerattn_gate_type": "Qbest_Kavg"}, weights))
    assert "unknown gate type 'Qbest_Kavg'" in message
    config = decode() | {"seerattn_q_head_pooling_type": "Qavgproj"}
    message = refusal(write(tmp_path / "b", config, weights_of(decode())))
    assert "seerattn_q_head_pooling_type is 'Qavgproj', this version reads Qproj alone" in message


def test_missing_weights(tmp_path):
    folder = write(tmp_path / "gates", prefill())
    (folder / "attn_gate_weights.pth").unlink()
    message = refusal(folder, FileNotFoundError)
    assert message.endswith("holds published settings but no attn_gate_weights.pth; download the gates again")


@pytest.mark.parametrize("kept", [0, 4, 100, 1000, -10])
def test_truncated_weights(tmp_path, kept):
    folder = write(tmp_path / "gates", prefill())
    file = folder / "attn_gate_weights.pth"
    file.write_bytes(file.read_bytes()[:kept])
    assert "damaged" in refusal(folder)


@pytest.mark.parametrize("text", [b"version https://git-lfs.github.com/spec/v1\nsize 1\n", b"<html>", b"PK"])
def test_files_that_are_something_else(tmp_path, text):
    folder = write(tmp_path / "gates", prefill())
    (folder / "attn_gate_weights.pth").write_bytes(text)
    assert "is damaged, compressed, or a bare pickle" in refusal(folder)


def test_a_file_damaged_inside(tmp_path):
    folder = write(tmp_path / "gates", prefill())
    file = folder / "attn_gate_weights.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + bytes(50) + whole[250:])
    refusal(folder)


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:`torch.jit")
def test_a_program_of_torchscript(tmp_path):
    folder = write(tmp_path / "gates", prefill())
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "attn_gate_weights.pth")
    assert "is damaged or of another kind" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        ({3: torch.zeros(1)}, "holds a dict, not tensors by name"),
        ({KEY.format(0, "mask_linear_k"): "x"}, "is str, not a plain tensor of float32 or bfloat16"),
        ({KEY.format(0, "mask_linear_k"): torch.zeros(1, dtype=torch.int64)}, "is torch.int64, not a plain"),
        ({KEY.format(0, "mask_linear_k"): torch.zeros(1, dtype=torch.float16)}, "is torch.float16, not a"),
        ({KEY.format(0, "mask_linear_k"): torch.eye(2).to_sparse()}, "not a plain tensor"),
        ({}, "2 missing gate keys"),
    ],
)
def test_files_of_other_things_than_weights(tmp_path, content, words):
    assert words in refusal(write(tmp_path / "gates", prefill(), content))


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("beside_weights", [False, True])
@pytest.mark.parametrize("how", ["touch", "system", "eval", "exec"])
def test_code_in_the_file_is_refused_and_never_run(tmp_path, how, beside_weights, bare):
    trace = tmp_path / "executed"
    bomb = {
        "touch": Bomb(Path.touch, trace),
        "system": Bomb(os.system, f"{sys.executable} -c \"open('{trace}', 'w')\""),
        "eval": Bomb(eval, f"open({str(trace)!r}, 'w')"),
        "exec": Bomb(exec, f"open({str(trace)!r}, 'w').close()"),
    }[how]
    content = {**weights_of(prefill()), "z": bomb} if beside_weights else bomb
    folder = write(tmp_path / "gates", prefill())
    file = folder / "attn_gate_weights.pth"
    if bare:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    for _ in range(2):
        message = refusal(folder)
        assert "not executed" in message
        assert "safetensors" in message
    assert not trace.exists()
    if how == "touch" and not bare:
        # The file is a real one: read without care, it runs.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(file, weights_only=False)
        assert trace.exists()


def test_our_layout_wins_where_both_are(tmp_path):
    folder = write(tmp_path / "published", prefill())
    host.save_gates(host.load_gates(folder), tmp_path / "ours", policy="top_k:0.5")
    (tmp_path / "ours" / "attn_gate_weights.pth").write_bytes(b"anything")
    assert host.load_gates(tmp_path / "ours").policy == "top_k:0.5"
