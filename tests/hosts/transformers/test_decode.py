"""Attached models decode sparsely: each token reads the blocks that it chooses, whatever way it comes."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from seerattention import baselines
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.attach import sparse_layer

BUDGET = "token_budget:48"
SHARE = "threshold:0.15"
STEP, SPARSE = "dense: decoding step", "sparse: decoding step"


def attached(tiny, kind="llama", decode=BUDGET, prefill="dense", **options):
    """A sparse model, its gates for both phases."""
    model = tiny.make(kind)
    gates = tiny.gates_for(model, phase="both")
    return host.attach(model, gates, prefill=prefill, decode=decode, min_tokens=0, **options)


def fed(tiny, model, ids, sizes, cache=None, mask=None):
    """Logits of a text given in parts, by a cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    outs, end = [], 0
    for part in ids.split(sizes, 1):
        end += part.shape[1]
        more = {}
        if mask is not None:
            positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)
            more = {"attention_mask": mask[:, :end], "position_ids": positions[:, -part.shape[1] :]}
        outs.append(tiny.logits(model, part, cache=cache, **more))
    return torch.cat(outs, 1)


def chosen(gate, call, row, decode):
    """Blocks that one token reads by formulas of its own, bool ``[Hk, blocks]``."""
    block, token, kv_heads = gate.block_size[1], gate.per_token(), call.k.shape[1]
    blocks, finished = row // block + 1, (row + 1) // block
    read = torch.zeros(kv_heads, blocks, dtype=torch.bool)
    read[:, -1] = True
    if finished:
        place = torch.arange(row + 1)
        keys = gate.compress(call.k_nope[:, :, : finished * block], positions=place[: finished * block])
        query = token.summarise_queries(call.q_nope[:, :, row : row + 1], positions=place[row:])[0, :, 0]
        keys = keys[0].repeat_interleave(len(query) // keys.shape[1], 0).unflatten(1, (finished, -1))
        scores = gate.scale * torch.einsum("he,hnse->hns", query.double(), keys.double()).amax(-1)
        share = scores.softmax(-1).unflatten(0, (kv_heads, -1)).amax(1)
        name, value = decode.split(":")
        if name == "threshold":
            read[:, :finished] |= share / share.sum(-1, keepdim=True) > float(value)
        else:
            others = share[:, : blocks - 1]
            best = others.argsort(dim=-1, descending=True, stable=True)[:, : int(value) // block - 1]
            read[:, : blocks - 1].scatter_(1, best, True)
    return read


@torch.no_grad()
def by_hand(tiny, kind, ids, prompt, decode, dtype=torch.float32):
    """Logits of a text at once, every token after the prompt attending to what it chooses."""
    model = tiny.make(kind)
    gates = dict(tiny.gates_for(model, phase="both").to(dtype).items())
    model = model.to(dtype)

    def handler(call):
        gate, block, group = gates[call.layer], tiny.block, call.q.shape[1] // call.k.shape[1]
        seen = torch.ones(call.q.shape[1], ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for row in range(prompt, ids.shape[1]):
            read = chosen(gate, call, row, decode).repeat_interleave(block, 1)[:, : row + 1]
            seen[:, row, : row + 1] = read.repeat_interleave(group, 0)
        k, v = (x.repeat_interleave(group, 1) for x in (call.k, call.v))
        scores = call.scale * call.q @ k.mT
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        weights = scores.masked_fill(~seen, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if call.sinks is not None:
            total = total + call.sinks.to(dtype).exp()[:, None, None]
        return weights / total @ v

    with host.intercept(model, handler):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("decode", [BUDGET, SHARE])
def test_a_step_is_what_each_token_chooses(tiny, kind, decode):
    """With windows, soft-caps, sinks, a part of each head rotated: by hand at once, and token by token."""
    ids = tiny.tokens(1, 110)
    results = [by_hand(tiny, kind, ids, 70, decode, to) for to in (torch.float32, torch.float64)]
    model = attached(tiny, kind, decode)
    for sizes in ((70, *(1,) * 40), (70, 5, 15, 1, 1, 10, 8)):
        tiny.assert_as_close(fed(tiny, model, ids, sizes), *results)
    layers = len(tiny.full_layers(model))
    assert host.usage(model) == {"dense: no policy for prefill": 2 * layers, SPARSE: 46 * layers}


def test_prefill_and_decoding_are_sparse_each_by_its_policy(tiny):
    """A prompt, an answer, a second turn: the turn chooses as if nothing had been decoded in between."""
    model, ids, pieces = attached(tiny, prefill="threshold:0.2"), tiny.tokens(1, 128), []
    whole = attached(tiny, prefill="threshold:0.2", decode="dense")
    for each in (model, whole):
        cache = DynamicCache(config=each.config)
        fed(tiny, each, ids, (64, *(1,) * 24, 40), cache)
        pieces.append(cache.seerattention_summaries[0])
        assert pieces[-1].kept.tokens == [128]
    assert host.usage(model) == {"sparse": 4, SPARSE: 48}
    assert host.usage(whole) == {"sparse": 4, STEP: 48}
    # The first layer's keys do not depend on how attention was computed.
    for name in ("sums", "tail_sums"):
        assert torch.equal(*(getattr(one.kept, name) for one in pieces))
    got, expected = (one.read() for one in pieces)
    tiny.assert_as_close(got, expected, expected.double())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scorer", ["quest", "meanpool", "oracle", "streaming"])
def test_baselines_decode(tiny, scorer, static):
    """What reads keys after RoPE, in two kinds of pieces, and beside gates that choose in prefill."""
    model, gold, ids, outs = tiny.make(), tiny.make().double(), tiny.tokens(2, 100), []
    one = baselines.create(scorer, block_size=(16, 16))
    options = {"prefill": "threshold:0.2", "decode": BUDGET, "min_tokens": 0}
    for each, sizes in ((model, (70, *(1,) * 30)), (model, (70, 15, 15)), (gold, (70, *(1,) * 30))):
        host.attach(each, one, **options)
        cache = StaticCache(config=model.config, max_cache_len=128) if static else None
        outs.append(fed(tiny, each, ids, sizes, cache))
        assert host.usage(each)[SPARSE] == 2 * len(sizes[1:])
    tiny.assert_as_close(*outs)
    options["prefill"] = "dense"
    host.attach(model, tiny.gates_for(model), decode_gates=one, **options)
    assert "decode_gate" not in dict(model.model.layers[0].self_attn.named_children())
    outs.append(fed(tiny, model, ids, (70, *(1,) * 30)))
    host.attach(model, one, **options)
    assert torch.equal(fed(tiny, model, ids, (70, *(1,) * 30)), outs[3])
    assert not torch.equal(outs[3], outs[0])


def test_gates_of_their_own_for_decoding(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 128)
    first = tiny.gates_for(model)
    second = tiny.gates_for(model, phase="decode", init="random")
    sizes, parts = (70, *(1,) * 26, 32), []
    checksum = host.base_checksum(model)
    host.attach(model, first, prefill="threshold:0.2", decode=BUDGET, decode_gates=second, min_tokens=0)
    for layer, gate in second.items():
        attention = model.model.layers[layer].self_attn
        assert attention.decode_gate is gate
        assert attention.attn_gate is dict(first.items())[layer]
        assert not any(p.requires_grad for p in gate.parameters())
    assert host.base_checksum(model) == checksum
    parts.append(fed(tiny, model, ids, sizes))
    assert host.usage(model) == {"sparse": 4, SPARSE: 52}
    host.detach(model)
    assert not any("gate" in name and "gate_proj" not in name for name, _ in model.named_parameters())
    assert all(p.requires_grad for p in second.parameters())
    # Its steps are those of a model that has nothing but these gates.
    host.attach(model, second, prefill="dense", decode=BUDGET, min_tokens=0)
    dense = fed(tiny, model, ids, sizes)
    host.attach(model, first, prefill="dense", decode=BUDGET, decode_gates=second, min_tokens=0)
    assert torch.equal(fed(tiny, model, ids, sizes), dense)
    assert not torch.equal(parts[0], dense)


def test_saved_policies_are_the_default(tiny, tmp_path):
    model = tiny.make()
    gates = tiny.gates_for(model, phase="both")
    gates.policy, gates.decode_policy = "threshold:0.2", BUDGET
    decoders = tiny.gates_for(model, phase="decode")
    decoders.decode_policy = "token_budget:64"
    ids = tiny.tokens(1, 70)
    for options, used in (
        ({}, {"sparse", SPARSE}),
        ({"decode": "dense"}, {"sparse", STEP}),
        ({"prefill": "dense"}, {"dense: no policy for prefill", SPARSE}),
        ({"policy": "top_k:0.3"}, {"sparse", SPARSE}),
    ):
        host.attach(model, gates, min_tokens=0, **options)
        fed(tiny, model, ids, (66, 4))
        assert set(host.usage(model)) == used
    host.attach(model, decoders, min_tokens=0)
    fed(tiny, model, ids, (66, 4))
    assert set(host.usage(model)) == {"dense: no policy for prefill", SPARSE}
    # Beside others, and chosen by name; what is not said stays as it is.
    host.add_gates(model, "both", gates)
    host.add_gates(model, "prefill", tiny.gates_for(model), "top_k:0.3")
    host.add_gates(
        model, "apart", tiny.gates_for(model), "top_k:0.3", decode_gates=tiny.gates_for(model, phase="decode")
    )
    expected = {"both": (0.2, 48), "prefill": (0.3, 64), "apart": (0.3, 64), "default": (None, 64)}
    for name, (prefill, decode) in expected.items():
        host.set_gates(model, name)
        layer = sparse_layer(model)
        policy, decoding = layer.prefill.policy, layer.decode.policy
        assert (policy and getattr(policy, policy.value_name())) == prefill
        assert (decoding and decoding.tokens) == decode
        assert ("decode_gate" in dict(model.model.layers[0].self_attn.named_children())) == (name == "apart")


def test_policies_in_use_are_saved(tiny, tmp_path):
    model = attached(tiny, prefill="threshold:0.2")
    host.save_gates(model, tmp_path / "both")
    saved = host.load_gates(tmp_path / "both")
    assert (saved.policy, saved.decode_policy) == ("threshold:0.2", BUDGET)
    # Those for decoding alone belong to other gates.
    others = tiny.gates_for(model, phase="decode")
    host.attach(model, tiny.gates_for(model), "top_k:0.5", decode=BUDGET, decode_gates=others)
    host.save_gates(model, tmp_path / "one")
    assert host.load_gates(tmp_path / "one").decode_policy is None


def test_policies_change_while_a_text_goes_on(tiny):
    """Decoding is switched on, off and changed between two tokens of one cache."""
    model, ids = attached(tiny, prefill="threshold:0.2"), tiny.tokens(1, 120)
    changes = (
        {"decode": SHARE},
        {"decode": "dense"},
        {"decode": BUDGET},
        {"prefill": "dense"},
        {"policy": "top_k:1"},
    )
    cache, outs = DynamicCache(config=model.config), []
    for change, part in zip(({}, *changes), ids.split((70, 10, 10, 10, 3, 17), 1), strict=True):
        if change:
            host.set_policy(model, **change)
        outs.append(tiny.logits(model, part, cache=cache))
    assert host.usage(model) == {"sparse": 4, SPARSE: 6, STEP: 2}
    assert cache.seerattention_summaries[0].kept.tokens == [120]


def test_gates_for_prefill_decode_too(tiny):
    """From their summaries of keys; what they were taught for changes nothing."""
    outs, parts = [], tiny.tokens(1, 75).split((70, 5), 1)
    for phase in ("prefill", "both"):
        model = tiny.make()
        cache = DynamicCache(config=model.config)
        host.attach(model, tiny.gates_for(model, phase=phase), "top_k:0.4", decode=BUDGET, min_tokens=0)
        outs.append([tiny.logits(model, part, cache=cache) for part in parts])
        assert host.usage(model) == {"sparse": 2, SPARSE: 2}
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))


def test_what_cannot_decode_is_refused_at_once(tiny):
    model = tiny.make()
    gates, both = tiny.gates_for(model), tiny.gates_for(model, phase="both")
    decoding, groups = tiny.gates_for(model, phase="decode"), baselines.create("xattention")

    class Own:
        block_size, after_rope, tokens_per_summary = (16, 16), True, 16
        score = compress = None

    for error, match, call in (
        (
            ValueError,
            "taught for decoding alone; leave the policy",
            lambda: host.attach(model, decoding, "top_k:1"),
        ),
        (ValueError, "share of a whole prompt", lambda: host.attach(model, both, decode="top_k:0.1")),
        (
            ValueError,
            "dense_last_rows",
            lambda: host.attach(model, both, decode="top_p:0.9,dense_last_rows=1"),
        ),
        (ValueError, "less than a block of 16", lambda: host.attach(model, both, decode="token_budget:15")),
        (ValueError, "say how much", lambda: host.attach(model, gates, "top_k:1", decode_gates=decoding)),
        (ValueError, "without a policy; pass one", lambda: host.attach(model, both)),
        (ValueError, "both be dense; use dense", lambda: host.attach(model, decoding, decode="dense")),
        (ValueError, "groups of queries and cannot", lambda: host.attach(model, groups, decode=BUDGET)),
        (ValueError, "leave one of them out", lambda: host.attach(model, both, "top_k:1", prefill="top_k:1")),
        (ValueError, "Own has no per_token", lambda: host.attach(model, Own(), decode=BUDGET)),
        (
            TypeError,
            "must be Gates or a Scorer",
            lambda: host.attach(model, both, decode=BUDGET, decode_gates="q"),
        ),
        (TypeError, "must be Gates or a Scorer", lambda: host.attach(model, None, decode=BUDGET)),
        (TypeError, "must be a Policy or text", lambda: host.attach(model, both, decode=48)),
    ):
        with pytest.raises(error, match=match):
            call()
        assert not host.attached(model)
    host.attach(model, gates, "top_k:1", min_tokens=0)
    for error, match, change in (
        (ValueError, "share of a whole prompt", {"decode": "top_k:0.1"}),
        (ValueError, 'pass one, .* or decode="dense"', {}),
        (ValueError, "both be dense", {"prefill": "dense"}),
    ):
        with pytest.raises(error, match=match):
            host.set_policy(model, **change)
    assert str(sparse_layer(model).prefill.policy) == "top_k:1"
