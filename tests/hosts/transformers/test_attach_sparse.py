"""Sparse prefill reads what the gate and the policy choose, computes no more, and says what it did."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from seerattention import baselines
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.attach import prompt_of, sparse_layer
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.policies import parse, select
from seerattention.rows import Rows
from seerattention.selection import causal_blocks


class Recorder:
    """An observer that keeps every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, layer, call, selection):
        self.calls.append((layer, call, selection))


def test_density_is_what_was_asked(tiny, family):
    model, seen = tiny.make(family), Recorder()
    host.attach(model, tiny.gates_for(model), "top_k:0.25", min_tokens=0, observe=seen)
    tiny.logits(model, tiny.tokens(2, 40 * tiny.block))
    assert [layer for layer, _, _ in seen.calls] == [0, 1]
    for _, _, selection in seen.calls:
        assert selection.shape == (2, 4, 40, 40)
        # k = floor((1 - sqrt(0.75)) * 40) = 5 blocks a row, the own one among them.
        expected = torch.arange(1, 41, dtype=torch.int32).clamp(max=5)
        assert torch.equal(selection.counts, expected.expand(2, 4, 40))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_layer_equals_its_slow_computation(tiny, kind, length):
    """Gate, policy and reference op, each run by hand on what `intercept` hands over."""
    model, ids = tiny.make(kind), tiny.tokens(1, length)
    gates, seen, captured = tiny.gates_for(model), Recorder(), {}
    host.attach(model, gates, "top_k:0.8,sink_blocks=1", min_tokens=0, observe=seen)

    def by_hand(call):
        gate, positions = dict(gates.items())[call.layer], torch.arange(length)
        assert call.k_nope.shape == call.k.shape
        scores = gate(call.q_nope, call.k_nope, positions=positions)
        selection = select(
            parse("top_k:0.8,sink_blocks=1"),
            scores,
            rows=Rows.last(length, length),
            block_size=(16, 16),
        )
        captured[call.layer] = selection
        return block_sparse_attention(
            call.q,
            call.k,
            call.v,
            selection,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            backend="reference",
        )

    result = tiny.logits(model, ids)
    with host.intercept(model, by_hand):
        slow = tiny.logits(model, ids)
    gold_model = tiny.make(kind).double()
    host.attach(gold_model, tiny.gates_for(gold_model), "top_k:0.8,sink_blocks=1", min_tokens=0)
    tiny.assert_as_close(result, slow, tiny.logits(gold_model, ids))
    for layer, _, selection in seen.calls:
        assert torch.equal(selection.to_mask(), captured[layer].to_mask())


def test_q_and_k_are_those_before_rope(tiny, kind):
    model, ids = tiny.make(kind), tiny.tokens(2, 30)
    calls = []

    def handler(call):
        calls.append(call)
        return call.dense()

    with host.intercept(model, handler):
        tiny.logits(model, ids)
    order = torch.tensor(tiny.order(model))
    for call in calls:
        for before, after in ((call.q_nope, call.q), (call.k_nope, call.k)):
            assert torch.equal(
                tiny.rotated(model, call.layer, before[..., order.argsort()], torch.arange(30)[None]), after
            )


def test_unselected_keys_and_values_do_not_matter(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 100)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    handler = sparse_layer(model)
    poisoned = []

    def poison(call):
        kept = []
        out = replace(handler, observe=lambda layer, call, selection: kept.append(selection))(call)
        mask = kept[0].to_mask().unflatten(1, (2, 2)).any(2)
        # A query reads its own head's blocks only: poison what no head of the group reads in any row.
        unread = ~mask.any(2).repeat_interleave(16, -1)[..., :100]
        k, v = call.k.clone(), call.v.clone()
        k[unread], v[unread] = float("nan"), float("nan")
        again = block_sparse_attention(call.q, k, v, kept[0], scale=call.scale)
        assert torch.equal(again, out)
        poisoned.append(int(unread.sum()))
        return out

    with host.intercept(model, poison):
        assert tiny.logits(model, ids).isfinite().all()
    assert len(poisoned) == 2


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("pieces", [(32, 64, 48), (16,) * 9])
def test_pieces_select_like_one_shot(tiny, kind, pieces, padding):
    """By threshold, in pieces of whole blocks, also where a padded batch shifts every row."""
    model, length = tiny.make(kind), sum(pieces)
    ids = tiny.tokens(2, length)
    whole, parts = Recorder(), Recorder()
    gates = tiny.gates_for(model)
    host.attach(model, gates, "threshold:0.2", min_tokens=0, observe=whole)
    expected = tiny.logits(model, ids)
    host.attach(model, gates, "threshold:0.2", min_tokens=0, observe=parts)
    cache = DynamicCache(config=model.config)
    mask = torch.cat([torch.zeros(2, padding), torch.ones(2, length)], 1).long()
    if padding:
        ids = torch.cat([torch.zeros(2, padding, dtype=torch.long), ids], 1)
    done, outs = 0, []
    for size in (padding + pieces[0], *pieces[1:]):
        part = slice(done, done + size)
        done += size
        inputs = {"attention_mask": mask[:, :done]} if padding else {}
        positions = (mask[:, :done].cumsum(-1) - 1).clamp(min=0)[:, part]
        outs.append(tiny.logits(model, ids[:, part], cache=cache, position_ids=positions, **inputs))
    for layer in dict(gates.items()):
        one = next(s for at, _, s in whole.calls if at == layer).to_mask()
        rows = [[], []]
        for at, call, selection in parts.calls:
            if at == layer:
                padded_mask = torch.nn.functional.pad(
                    selection.to_mask(), (0, one.shape[3] - selection.shape[3])
                )
                if call.rows.is_packed:
                    lines = [down for _, (down, _) in call.rows.maps((16, 16))]
                    padded_mask = torch.cat([padded_mask[:, :, down] for down in lines])
                for row in (0, 1):
                    rows[row].append(padded_mask[row])
        assert torch.equal(torch.stack([torch.cat(r, 1) for r in rows]), one)
        assert one.sum() < causal_blocks(length, length, (16, 16)).sum() * one[..., 0, 0].numel()
    gold = tiny.make(kind).double()
    host.attach(gold, tiny.gates_for(gold), "threshold:0.2", min_tokens=0)
    gold_logits = tiny.logits(gold, ids[:, padding:])
    tiny.assert_as_close(torch.cat(outs, 1)[:, padding:], expected, gold_logits)


def test_decoding_is_dense_and_says_so(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 40)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    assert host.usage(model) == {}
    model.generate(ids, max_new_tokens=4, do_sample=False)
    assert host.usage(model) == {"sparse": 2, "dense: decoding step": 6}


def test_short_prompts_are_dense_and_say_so(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 40)
    dense = tiny.logits(model, ids)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=41)
    assert torch.equal(tiny.logits(model, ids), dense)
    assert host.usage(model) == {"dense: fewer than 41 tokens": 2}
    tiny.logits(model, tiny.tokens(1, 41))
    assert host.usage(model)["sparse"] == 2


def test_a_prompt_too_short_for_what_was_asked_says_so(tiny):
    model = tiny.make()
    host.attach(model, tiny.gates_for(model), "top_k:0.1,sink_blocks=1", min_tokens=0)
    tiny.logits(model, tiny.tokens(1, 100))
    # 7 blocks: a row reads two of them, 13 pairs of 28.
    why = (
        "top_k:0.1,sink_blocks=1 asks for 10.0% of a prompt of 7 blocks and reads 46.4%: a row reads whole "
        "blocks, at least 2"
    )
    assert host.usage(model).short == (why,)
    assert str(host.usage(model)) == f"{{'sparse': 2}}; too short: {why}"
    model.generate(tiny.tokens(1, 100), max_new_tokens=2, do_sample=False)
    assert host.usage(model).short == (why,), "a decoding step is no prompt"
    host.set_policy(model, "top_k:0.52")
    with torch.no_grad(), prompt_of(model, 160):
        model(tiny.tokens(1, 80))
    assert host.usage(model).short == (why,), "a piece of a prompt that is long enough"


@pytest.mark.parametrize("name", baselines.names())
def test_baselines_attach_to_every_layer(tiny, name):
    model, ids, seen = tiny.make(), tiny.tokens(1, 200), Recorder()
    dense, gold = tiny.logits(model, ids), tiny.gold_logits(model, ids)
    scorer = baselines.create(name, block_size=(16, 16))
    host.attach(model, scorer, "top_k:0.8", min_tokens=0, observe=seen)
    assert not torch.equal(tiny.logits(model, ids), dense)
    assert [layer for layer, _, _ in seen.calls] == [0, 1]
    assert host.usage(model) == {"sparse": 2}
    host.set_policy(model, "top_k:1")
    tiny.assert_as_close(tiny.logits(model, ids), dense, gold)


def test_baseline_over_pieces_with_padding(tiny):
    model, ids = tiny.make(), tiny.tokens(2, 96)
    host.attach(model, baselines.create("quest", block_size=(16, 16)), "threshold:0.1", min_tokens=0)
    expected = tiny.logits(model, ids)
    gold = tiny.make().double()
    host.attach(gold, baselines.create("quest", block_size=(16, 16)), "threshold:0.1", min_tokens=0)
    cache = DynamicCache(config=model.config)
    outs = [tiny.logits(model, part, cache=cache) for part in ids.split((32, 48, 16), 1)]
    tiny.assert_as_close(torch.cat(outs, 1), expected, tiny.logits(gold, ids))


def test_gradients(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 60)
    gates = tiny.gates_for(model)
    host.attach(model, gates, "top_k:0.8", min_tokens=0)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            gradient = getattr(layer.self_attn, name).weight.grad
            assert gradient is not None
            assert gradient.isfinite().all()
            assert gradient.any()


def test_gradients_equal_dense_ones_for_a_full_selection(tiny):
    ids, gradients = tiny.tokens(1, 60), []
    for attached in (False, True):
        model = tiny.make().double()
        if attached:
            host.attach(model, tiny.gates_for(model), "top_k:1", min_tokens=0, backend="reference")
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    dense, sparse = gradients
    tiny.assert_as_close(sparse.float(), dense.float(), dense)


def test_gates_without_grad_run_the_fast_backend(tiny):
    model, ids = tiny.make().requires_grad_(False), tiny.tokens(1, 60)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    assert model(ids).logits.isfinite().all()


def test_unknown_backend(tiny):
    model = tiny.make()
    with pytest.raises(ValueError, match=r"unknown backend 'warp'; there are auto, .*gather"):
        host.attach(model, tiny.gates_for(model), "top_k:0.8", backend="warp")
