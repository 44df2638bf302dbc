"""Texts past what gates were taught for are warned of, once, and only where gates say how far that is."""

import copy
import warnings

import pytest
from transformers import DynamicCache, StaticCache

from seerattention import baselines
from seerattention.hosts import transformers as host

PAST = (
    "a text of {} tokens is past the 64 positions that these gates were taught for, where they may choose "
    "worse than gates that were not taught at all: distil gates with a reach of {} or more"
)


@pytest.fixture
def model(tiny):
    return tiny.make()


def taught(tiny, model, **settings):
    gates = tiny.gates_for(model, **settings)
    gates.reach = 64
    return gates


def silent(tiny, model, *sizes, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in sizes:
            tiny.logits(model, tiny.tokens(1, size), **more)


def test_a_prompt_past_the_reach_is_warned_of_once(tiny, model):
    gates = taught(tiny, model)
    host.attach(model, gates, "top_k:0.5", min_tokens=0)
    silent(tiny, model, 64)
    with pytest.warns(UserWarning, match=PAST.format(80, 80)) as found:
        tiny.logits(model, tiny.tokens(1, 80))
    assert len(found) == 1
    silent(tiny, model, 80, 96)
    host.set_policy(model, "top_k:0.3")
    silent(tiny, model, 96)
    host.attach(model, gates, "top_k:0.5", min_tokens=0)
    with pytest.warns(UserWarning, match=PAST.format(96, 96)):
        tiny.logits(model, tiny.tokens(1, 96))


def test_dense_prompts_and_what_does_not_say_its_reach_are_not_warned_of(tiny, model):
    gates = taught(tiny, model)
    host.attach(model, gates, "top_k:0.5", min_tokens=200)
    silent(tiny, model, 96)
    host.attach(model, gates, "top_k:0.5", min_tokens=0)
    with host.dense(model):
        silent(tiny, model, 96)
    host.attach(model, baselines.create("quest"), "top_k:0.5", min_tokens=0)
    silent(tiny, model, 96)
    host.attach(model, tiny.gates_for(model), "top_k:0.5", min_tokens=0)
    silent(tiny, model, 96)


def test_padding_does_not_count(tiny, model):
    host.attach(model, taught(tiny, model), "top_k:0.5", min_tokens=0)
    mask = tiny.tokens(1, 80) >= 0
    mask[:, :16] = False
    silent(tiny, model, 80, attention_mask=mask.long())


def test_each_set_of_gates_has_its_reach_and_copies_have_it_too(tiny, model):
    gates = taught(tiny, model)
    further = copy.deepcopy(gates)
    assert further.reach == 64
    further.reach = 128
    host.attach(model, further, "top_k:0.5", min_tokens=0)
    host.add_gates(model, "near", gates)
    silent(tiny, model, 96)
    host.set_gates(model, "near")
    with pytest.warns(UserWarning, match="past the 64 positions"):
        tiny.logits(model, tiny.tokens(1, 96))


def test_decoding_past_the_reach_is_warned_of(tiny, model):
    gates = taught(tiny, model, phase="decode")
    host.attach(model, gates, decode="token_budget:32", min_tokens=0)
    ids, cache = tiny.tokens(1, 66), DynamicCache(config=model.config)
    silent(tiny, model, 62, cache=cache)
    silent(tiny, model, 1, 1, cache=cache)
    with pytest.warns(UserWarning, match=PAST.format(65, 65)) as found:
        tiny.logits(model, ids[:, :1], cache=cache)
    assert len(found) == 1
    silent(tiny, model, 1, cache=cache)


def test_before_steps_of_a_static_cache_its_prompt_is_looked_at(tiny, model):
    gates = taught(tiny, model, phase="decode")
    host.attach(model, gates, decode="token_budget:32", min_tokens=0)
    cache = StaticCache(config=model.config, max_cache_len=128)
    with pytest.warns(UserWarning, match=PAST.format(80, 80)) as found:
        tiny.logits(model, tiny.tokens(1, 80), cache=cache)
    assert len(found) == 1
    silent(tiny, model, 1, cache=cache)
