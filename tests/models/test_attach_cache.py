"""Block summaries follow the KV cache through crops, copies and reorderings, and are never stale."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from seerattention import models
from seerattention.cache import KeySummaries
from seerattention.gate import AttnGate, GateConfig

CHANGED = "dense: the KV cache holds keys not summarised here (filled before attach, or changed)"


class Case:
    """A sparse model, and what it gives for a text at once in fp32 and fp64."""

    def __init__(self, tiny, kind="llama", policy="threshold:0.25"):
        self.tiny, self.model, self.gold = tiny, tiny.make(kind), tiny.make(kind).double()
        self.gates, self.policy = tiny.gates_for(self.model), policy
        self.attach()
        models.attach(self.gold, tiny.gates_for(self.gold), policy, min_tokens=0)

    def attach(self):
        models.attach(self.model, self.gates, self.policy, min_tokens=0)

    def cache(self):
        return DynamicCache(config=self.model.config)

    def feed(self, ids, cache, **kwargs):
        """Give a piece; returns its logits and how its layers were computed."""
        before = models.usage(self.model)
        out = self.tiny.logits(self.model, ids, past_key_values=cache, **kwargs)
        after = models.usage(self.model)
        return out, {k for k in after if after[k] != before.get(k)}

    def assert_like_one_shot(self, out, ids):
        """``out`` is what the sparse model gives for the last tokens of ``ids`` given at once."""
        new = out.shape[1]
        expected, gold = self.tiny.logits(self.model, ids), self.tiny.logits(self.gold, ids)
        self.tiny.assert_as_close(out, expected[:, -new:], gold[:, -new:])


@pytest.mark.parametrize("removed", [3, 8, 16, 24, 32])
def test_cropped_cache(tiny, removed):
    """A crop that leaves whole blocks, or cuts only the unfinished one, keeps the summaries."""
    case = Case(tiny)
    ids, other = tiny.tokens(1, 72), tiny.tokens(1, 40, seed=5)
    cache = case.cache()
    case.feed(ids, cache)
    cache.crop(-removed)
    kept = 72 - removed
    out, how = case.feed(other, cache)
    if kept % 16 == 0 or kept > 64:
        assert how == {"sparse"}
        if kept % 16 == 0:
            case.assert_like_one_shot(out, torch.cat([ids[:, :kept], other], 1))
    else:
        assert how == {CHANGED}
    out, how = case.feed(tiny.tokens(1, 1), cache)
    assert how == {"dense: decoding step"}


def test_cropped_to_nothing_starts_anew(tiny):
    case, ids = Case(tiny), tiny.tokens(1, 64)
    cache = case.cache()
    case.feed(tiny.tokens(1, 50, seed=9), cache)
    cache.crop(-50)
    out, how = case.feed(ids, cache)
    assert how == {"sparse"}
    case.assert_like_one_shot(out, ids)


def test_cropped_and_refilled_with_another_text(tiny):
    """Other tokens in the middle of blocks, alike at every block's end: the first layer's last keys agree."""
    case = Case(tiny)
    ids, other = tiny.tokens(1, 64), tiny.tokens(1, 64, seed=4)
    other[:, 15::16] = ids[:, 15::16]
    cache = case.cache()
    case.feed(ids, cache)
    cache.crop(-64)
    models.detach(case.model)
    tiny.logits(case.model, other, past_key_values=cache)
    case.attach()
    _, how = case.feed(tiny.tokens(1, 16, seed=6), cache)
    assert how == {CHANGED}


def test_rows_swapped_whose_blocks_end_alike(tiny):
    case = Case(tiny)
    ids = tiny.tokens(2, 64)
    ids[1, 15::16] = ids[0, 15::16]
    cache = case.cache()
    case.feed(ids, cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    _, how = case.feed(tiny.tokens(2, 16, seed=6), cache)
    assert how == {CHANGED}


@pytest.mark.parametrize("decode_first", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    ],
    ids=["swap", "one row", "repeat", "reorder"],
)
def test_rows_changed(tiny, change, decode_first):
    case, ids = Case(tiny), tiny.tokens(2, 50)
    cache = case.cache()
    case.feed(ids, cache)
    change(cache)
    rows = cache.layers[0].keys.shape[0]
    if decode_first:
        _, how = case.feed(tiny.tokens(rows, 1, seed=8), cache)
        assert how == {"dense: decoding step"}
    out, how = case.feed(tiny.tokens(rows, 20, seed=6), cache)
    assert how == {CHANGED}
    assert out.isfinite().all()


def test_same_order_keeps_the_summaries(tiny):
    case, ids = Case(tiny), tiny.tokens(2, 64)
    cache = case.cache()
    case.feed(ids[:, :48], cache)
    cache.reorder_cache(torch.tensor([0, 1]))
    out, how = case.feed(ids[:, 48:], cache)
    assert how == {"sparse"}
    case.assert_like_one_shot(out, ids)


def test_filled_by_the_dense_model(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 60)
    cache = DynamicCache(config=model.config)
    gold, dense = tiny.gold_logits(model, ids), tiny.logits(model, ids)
    tiny.logits(model, ids[:, :40], past_key_values=cache)
    models.attach(model, tiny.gates_for(model), "top_k:0.1", min_tokens=0)
    out = tiny.logits(model, ids[:, 40:], past_key_values=cache)
    assert models.usage(model) == {CHANGED: 2}
    tiny.assert_as_close(out, dense[:, 40:], gold[:, 40:])


def test_other_gates_do_not_read_these_summaries(tiny):
    case, ids = Case(tiny), tiny.tokens(1, 64)
    cache = case.cache()
    case.feed(ids[:, :48], cache)
    other = models.new_gates(case.model, block_size=16, init="random")
    models.attach(case.model, other, case.policy, min_tokens=0)
    _, how = case.feed(ids[:, 48:], cache)
    assert how == {CHANGED}


def test_copied_cache(tiny):
    """A prefix computed once serves several continuations."""
    case, prefix = Case(tiny), tiny.tokens(1, 48)
    cache = case.cache()
    case.feed(prefix, cache)
    for seed in (2, 3):
        branch, end = copy.deepcopy(cache), tiny.tokens(1, 32, seed=seed)
        out, how = case.feed(end, branch)
        assert how == {"sparse"}
        case.assert_like_one_shot(out, torch.cat([prefix, end], 1))
        assert branch.get_seq_length() == 80
    assert cache.get_seq_length() == 48


def test_padding_that_begins_in_a_later_piece(tiny):
    case, ids = Case(tiny), tiny.tokens(2, 64)
    cache = case.cache()
    _, how = case.feed(ids[:, :32], cache)
    assert how == {"sparse"}
    mask = torch.ones(2, 64)
    mask[1, 48:] = 0
    out, how = case.feed(ids[:, 32:], cache, attention_mask=mask)
    assert how == {"sparse"}
    case.assert_like_one_shot(out[:1], ids[:1])
    case.assert_like_one_shot(out[1:, :16], ids[1:, :48])


def test_decoded_tokens_are_summarised_too(tiny):
    """A chat: prompt, decoded answer, next prompt. All of it selects as if given at once."""
    case, ids = Case(tiny), tiny.tokens(1, 80)
    cache = case.cache()
    case.feed(ids[:, :32], cache)
    for token in range(32, 48):
        _, how = case.feed(ids[:, token : token + 1], cache)
        assert how == {"dense: decoding step"}
    _, how = case.feed(ids[:, 48:], cache)
    assert how == {"sparse"}
    summaries = cache.seerattention_summaries[0, None]
    gate = summaries.scorer
    at_once = {}

    def keep(call):
        at_once[call.layer] = gate.compress(call.k_nope, positions=call.positions)
        return call.dense()

    with models.intercept(case.model, keep):
        tiny.logits(case.model, ids)
    # The first layer's keys do not depend on how attention was computed.
    tiny.assert_as_close(summaries.all(), at_once[0], at_once[0].double())


def test_static_cache_by_hand(tiny, kind):
    case, ids = Case(tiny, kind), tiny.tokens(2, 64)
    cache = StaticCache(config=case.model.config, max_cache_len=128)
    outs = [case.feed(part, cache) for part in ids.split((32, 16, 16), 1)]
    assert all(how == {"sparse"} for _, how in outs)
    case.assert_like_one_shot(torch.cat([out for out, _ in outs], 1), ids)
    cache.reset()
    out, how = case.feed(ids, cache)
    assert how == {"sparse"}
    case.assert_like_one_shot(out, ids)


def test_beams_then_a_continuation(tiny):
    """Beams trade places at every step; the continuation may use summaries only where they still fit."""
    case, ids = Case(tiny), tiny.tokens(1, 40)
    cache = case.cache()
    case.model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, past_key_values=cache)
    in_order = cache.layers[0].keys.clone()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert not torch.equal(in_order, cache.layers[0].keys)
    _, how = case.feed(tiny.tokens(3, 20, seed=2), cache)
    assert how == {CHANGED}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans())
def test_fed_in_pieces_equals_fed_at_once(pieces, sub_blocks):
    config = GateConfig(4, 2, 8, block_size=16, k_sub_block=8 if sub_blocks else None)
    gate, length = AttnGate(config), sum(pieces)
    k, cached = torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    summaries = KeySummaries(gate)
    with torch.no_grad():
        at_once = gate.compress(k, positions=torch.arange(length))
        exact = gate.double().compress(k.double(), positions=torch.arange(length))
        gate.float()
        for part, part_cached in zip(k.split(pieces, 2), cached.split(pieces, 2), strict=True):
            assert summaries.matches(cached[:, :, : summaries.tokens])
            summaries.extend(part, part_cached)
        assert summaries.tokens == length
        got = summaries.all()
    assert got.shape == at_once.shape
    assert (got.double() - exact).abs().max() <= 2 * (at_once.double() - exact).abs().max() + 4 * torch.finfo(
        torch.float32
    ).eps * exact.abs().max()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(0, 69), st.integers(0, 1), st.integers(0, 7))
def test_any_changed_bit_is_noticed(length, token, head, dim):
    gate = AttnGate(GateConfig(4, 2, 8, block_size=16))
    k, cached = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    summaries = KeySummaries(gate)
    with torch.no_grad():
        summaries.extend(k, cached)
    changed = cached.clone()
    place = (0, head, token % length, dim)
    changed[place] = torch.nextafter(changed[place], torch.tensor(torch.inf))
    assert not summaries.matches(changed)
    assert summaries.matches(cached)


def test_a_cut_inside_a_finished_block_is_no_match():
    """Even where all cached keys are alike: the raw keys of that block are gone."""
    summaries = KeySummaries(AttnGate(GateConfig(4, 2, 8, block_size=16)))
    cached = torch.ones(1, 2, 40, 8)
    with torch.no_grad():
        summaries.extend(torch.randn(1, 2, 40, 8), cached)
    assert not summaries.matches(cached[:, :, :20])
    assert summaries.matches(cached[:, :, :36])
    assert summaries.matches(cached[:, :, :32])
    assert summaries.tokens == 32
