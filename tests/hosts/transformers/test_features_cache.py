"""Attached models and the caches that they work with, line by line of the README's table of features."""

import copy

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from seerattention.hosts import transformers as host
from tests.hosts.transformers.features import POLICY, EightBits, attached, lines, prove


def pieces_of(tiny, model, cache, ids, sizes):
    return torch.cat([tiny.logits(model, part, cache=cache) for part in ids.split(sizes, 1)], 1)


def assert_pieces_like_one_shot(tiny, make_cache):
    model, gold, ids = attached(tiny), attached(tiny).double(), tiny.tokens(1, 96)
    got = pieces_of(tiny, model, make_cache(model), ids, (32, 48, 16))
    tiny.assert_as_close(got, tiny.logits(model, ids), tiny.logits(gold, ids))
    assert set(host.usage(model)) == {"sparse"}


def dynamic(tiny, tmp_path):
    assert_pieces_like_one_shot(tiny, lambda model: DynamicCache(config=model.config))


def static(tiny, tmp_path):
    assert_pieces_like_one_shot(tiny, lambda model: StaticCache(config=model.config, max_cache_len=128))


def quantised(tiny, tmp_path):
    """What rounded keys cost is what they cost dense attention."""
    ids, results = tiny.tokens(1, 96), []
    for model in (attached(tiny, "top_k:1"), tiny.make(), tiny.make().double()):
        cache = Cache(layers=[EightBits(nbits=8, residual_length=16) for _ in range(2)])
        results.append(pieces_of(tiny, model, cache, ids, (32, 48, 16)))
    sparse, dense, gold = results
    tiny.assert_as_close(sparse, dense, gold)
    assert not torch.equal(dense, tiny.logits(tiny.make(), ids))
    model = attached(tiny)
    cache = Cache(layers=[EightBits(nbits=8, residual_length=16) for _ in range(2)])
    assert pieces_of(tiny, model, cache, ids, (32, 48, 16)).isfinite().all()
    assert set(host.usage(model)) == {"sparse"}


def changed_cache(tiny, tmp_path):
    """`test_attach_cache.py` has every change; here one after the other."""
    model, gold = attached(tiny), attached(tiny).double()
    ids, end = tiny.tokens(2, 64), tiny.tokens(1, 32, seed=2)
    cache = DynamicCache(config=model.config)
    tiny.logits(model, torch.cat([ids, ids], 1), cache=cache)
    cache = copy.deepcopy(cache)
    cache.crop(-64)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    whole = torch.cat([ids[1:], end], 1)
    got = tiny.logits(model, end, cache=cache)
    tiny.assert_as_close(got, tiny.logits(model, whole)[:, 64:], tiny.logits(gold, whole)[:, 64:])
    assert set(host.usage(model)) == {"sparse"}


def filled_elsewhere(tiny, tmp_path):
    model = tiny.make()
    ids, cache = tiny.tokens(1, 96), DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :32], cache=cache)
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
    tiny.logits(model, ids[:, 32:64], cache=cache)
    host.add_gates(model, "other", host.new_gates(model, block_size=32, init="random"))
    host.set_gates(model, "other")
    tiny.logits(model, ids[:, 64:], cache=cache)
    assert host.usage(model) == {"sparse": 4}


def longrope(tiny, tmp_path):
    model = tiny.make("phi3-longrope")
    ids, cache = tiny.tokens(1, 64), DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :32], cache=cache)
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
    tiny.logits(model, ids[:, 32:], cache=cache)
    (how,) = host.usage(model)
    raise NotImplementedError(how)


def taken_out(tiny, tmp_path):
    model = attached(tiny)
    ids, cache = tiny.tokens(1, 64), DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :32], cache=cache)
    before = host.usage(model)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    tiny.logits(model, ids[:, 32:], cache=cache)
    (how,) = set(host.usage(model)) - set(before)
    raise NotImplementedError(how)


KIND = "cache"
CHECKS = {
    "dynamic": dynamic,
    "static": static,
    "quantised": quantised,
    "copied, cropped, reordered, rows selected": changed_cache,
    "filled before attaching, or by other gates": filled_elsewhere,
    "the same with RoPE of type dynamic or longrope": longrope,
    "keys taken out, as by compression: sparse from then on": taken_out,
}


@lines(KIND)
def test_the_line_is_true(tiny, tmp_path, feature):
    prove(feature, CHECKS, tiny, tmp_path)
