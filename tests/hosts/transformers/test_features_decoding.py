"""Sparse steps of decoding, line by line of the table of features."""

import copy

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from seerattention import baselines
from seerattention.hosts import transformers as host
from tests.hosts.transformers.features import EightBits, decoding, generated, lines, prove


def steps(tiny, model, cache, mask=None):
    """Decode three tokens after 64; returns how."""
    ids, outs = tiny.tokens(2, 67), []
    before = host.usage(model)
    for begin, end in ((0, 64), (64, 65), (65, 67)):
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        outs.append(tiny.logits(model, ids[:, begin:end], cache=cache, **more))
    assert all(out.isfinite().all() for out in outs)
    after = host.usage(model)
    return {how for how in after if after[how] != before.get(how)} - {"dense: no policy for prefill"}


def static_steps(tiny, tmp_path):
    """`tests/gpu` replays graphs; the room of a cache does not change what a step gives."""
    model, ids, outs = decoding(tiny), tiny.tokens(1, 64), []
    for room in (80, 300):
        cache = StaticCache(config=model.config, max_cache_len=room)
        outs.append(generated(model, ids, cache))
    assert torch.equal(*outs)
    assert host.usage(model)["sparse: decoding step"] == 2 * 2 * 11


def padded_steps(tiny, tmp_path):
    model, mask = decoding(tiny), torch.ones(2, 67)
    mask[1, :20] = 0
    assert steps(tiny, model, DynamicCache(config=model.config), mask) == {"sparse: decoding step"}


def steps_after_padding(tiny, tmp_path):
    model, mask = decoding(tiny), torch.ones(2, 67)
    mask[1, 50:64] = 0
    assert steps(tiny, model, DynamicCache(config=model.config), mask) == {"dense: decoding step"}


def changed_steps(tiny, tmp_path):
    model, cache = decoding(tiny), DynamicCache(config=tiny.make().config)
    steps(tiny, model, cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache = copy.deepcopy(cache)
    cache.crop(-20)
    tiny.logits(model, tiny.tokens(2, 1), cache=cache)
    assert set(host.usage(model)) == {"dense: no policy for prefill", "sparse: decoding step"}


def quantised_steps(tiny, tmp_path):
    model = decoding(tiny)
    cache = Cache(layers=[EightBits(nbits=8, residual_length=16) for _ in range(2)])
    assert steps(tiny, model, cache) == {"sparse: decoding step"}


def gates_for_decoding(tiny, tmp_path):
    model = tiny.make()
    for own in (tiny.gates_for(model, phase="decode"), baselines.create("quest", block_size=(16, 16))):
        options = {"prefill": "dense", "decode": "token_budget:32", "min_tokens": 0}
        host.attach(model, tiny.gates_for(model), decode_gates=own, **options)
        assert steps(tiny, model, DynamicCache(config=model.config)) == {"sparse: decoding step"}


def steps_with_a_gradient(tiny, tmp_path):
    model, cache, ids = decoding(tiny), DynamicCache(config=tiny.make().config), tiny.tokens(1, 65)
    tiny.logits(model, ids[:, :64], cache=cache)
    model(ids[:, 64:], **host.cache_argument(model, cache)).logits.sum().backward()
    assert host.usage(model)["dense: decoding step"] == 2


KIND = "decoding"
CHECKS = {
    "static caches in CUDA graphs": static_steps,
    "left padding": padded_steps,
    "padding between a row's tokens": steps_after_padding,
    "beams, caches that were changed": changed_steps,
    "quantised and offloaded caches": quantised_steps,
    "gates of its own": gates_for_decoding,
    "with a gradient": steps_with_a_gradient,
}


@lines(KIND)
def test_the_line_is_true(tiny, tmp_path, feature):
    prove(feature, CHECKS, tiny, tmp_path)
