"""A full selection is dense attention: with every family, with padding, with caches, in generation."""

import copy

import pytest
import torch
from transformers import DynamicCache

from seerattention.hosts import transformers as host


def test_families_are_the_ones_promised():
    assert host.families() == [
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    ]
    assert list(host.refused()) == ["deepseek_v2", "deepseek_v3", "llama4_text"]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 150])
def test_one_sequence(tiny, kind, length):
    model, ids = tiny.make(kind), tiny.tokens(1, length)
    dense, gold = tiny.logits(model, ids), tiny.gold_logits(model, ids)
    tiny.attach_full(model)
    tiny.assert_as_close(tiny.logits(model, ids), dense, gold)
    assert set(host.usage(model)) == {"sparse"}


def test_batch_of_three(tiny, kind):
    model, ids = tiny.make(kind), tiny.tokens(3, 70)
    dense, gold = tiny.logits(model, ids), tiny.gold_logits(model, ids)
    tiny.attach_full(model)
    tiny.assert_as_close(tiny.logits(model, ids), dense, gold)
    tiny.assert_as_close(tiny.logits(model, ids, attention_mask=torch.ones_like(ids)), dense, gold)


def padded(tiny, side, lengths=(70, 33, 1)):
    ids, mask = torch.zeros(3, 70, dtype=torch.long), torch.zeros(3, 70, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(70 - length, None) if side == "left" else slice(0, length)
        ids[row, place] = tiny.tokens(1, length, seed=row)
        mask[row, place] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding(tiny, kind, side, use_cache):
    model = tiny.make(kind)
    ids, mask, positions = padded(tiny, side)
    inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": use_cache}
    dense, gold = tiny.logits(model, ids, **inputs), tiny.gold_logits(model, ids, **inputs)
    tiny.attach_full(model)
    real = mask.bool()
    tiny.assert_as_close(tiny.logits(model, ids, **inputs)[real], dense[real], gold[real])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_when_sparse(tiny, kind, side):
    model, gold = tiny.make(kind), tiny.make(kind).double()
    ids, mask, positions = padded(tiny, side)
    for one in (model, gold):
        host.attach(one, tiny.gates_for(one), "top_k:0.8", min_tokens=0)
    batch = tiny.logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, real in enumerate(mask.bool()):
        own = ids[row, real][None]
        tiny.assert_as_close(batch[row, real], tiny.logits(model, own)[0], tiny.logits(gold, own)[0])


@pytest.mark.parametrize("pieces", [(32, 32, 16, 1, 1), (16, 17, 30, 1, 2), (5, 1, 64, 12)])
@pytest.mark.parametrize("batch", [1, 2])
def test_cache_over_several_calls(tiny, kind, pieces, batch):
    model, ids = tiny.make(kind), tiny.tokens(batch, sum(pieces))
    dense, gold = tiny.logits(model, ids), tiny.gold_logits(model, ids)
    tiny.attach_full(model)
    cache = DynamicCache(config=model.config)
    outs = [tiny.logits(model, part, cache=cache) for part in ids.split(pieces, 1)]
    tiny.assert_as_close(torch.cat(outs, 1), dense, gold)
    reasons = set(host.usage(model))
    assert reasons <= {"sparse", "dense: decoding step"}
    assert ("dense: decoding step" in reasons) == (1 in pieces)


def test_cache_with_left_padding_over_several_calls(tiny, family):
    model = tiny.make(family)
    ids, mask, positions = padded(tiny, "left")
    inputs = {"attention_mask": mask, "position_ids": positions}
    dense, gold = tiny.logits(model, ids, **inputs), tiny.gold_logits(model, ids, **inputs)
    tiny.attach_full(model)
    cache, outs, done = DynamicCache(config=model.config), [], 0
    for size in (20, 32, 17, 1):
        part = slice(done, done + size)
        done += size
        outs.append(
            tiny.logits(
                model,
                ids[:, part],
                attention_mask=mask[:, :done],
                position_ids=positions[:, part],
                cache=cache,
            )
        )
    real = mask.bool()
    tiny.assert_as_close(torch.cat(outs, 1)[real], dense[real], gold[real])
    assert set(host.usage(model)) == {"sparse", "dense: decoding step"}


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_generation(tiny, kind, implementation, batch):
    model = tiny.make(kind)
    ids, mask, _ = padded(tiny, "left", (70, 33, 20))
    inputs = {"attention_mask": mask[:batch], "max_new_tokens": 12, "do_sample": False}
    if implementation:
        inputs["cache_implementation"] = implementation
    dense = model.generate(ids[:batch], **inputs)
    tiny.attach_full(model)
    assert torch.equal(model.generate(ids[:batch], **inputs), dense)
    assert host.usage(model)["sparse"] > 0


def test_sampling_and_beams(tiny, family):
    model, ids = tiny.make(family), tiny.tokens(2, 40)
    for inputs in ({"do_sample": True}, {"do_sample": False, "num_beams": 3}):
        torch.manual_seed(3)
        dense = model.generate(ids, max_new_tokens=8, **inputs)
        tiny.attach_full(model)
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids, max_new_tokens=8, **inputs), dense)
        host.detach(model)


def test_bfloat16(tiny, kind):
    model, ids = tiny.make(kind).to(torch.bfloat16), tiny.tokens(2, 70)
    dense, gold = tiny.logits(model, ids), tiny.gold_logits(model, ids)
    tiny.attach_full(model)
    tiny.assert_as_close(tiny.logits(model, ids), dense, gold)


@pytest.mark.parametrize(
    ("mixed", "implementation"),
    [
        ("qwen2-mixed", "eager"),
        ("qwen2-mixed", "sdpa"),
        ("olmo3", "sdpa"),
        ("gemma2", "eager"),
        ("gemma3_text", "sdpa"),
        ("gpt_oss", "eager"),
    ],
)
@pytest.mark.parametrize("static", [False, True])
def test_sliding_layers_stay_as_they_are(tiny, mixed, implementation, static):
    model, ids = tiny.make(mixed), tiny.tokens(2, 90)
    model.set_attn_implementation(implementation)
    inputs = {"max_new_tokens": 4, "do_sample": False} | (
        {"cache_implementation": "static"} if static else {}
    )

    def layer_outputs(model):
        seen = []
        hooks = [
            layer.self_attn.register_forward_hook(lambda m, a, out: seen.append(out[0]))
            for layer in model.model.layers
        ]
        model.generate(ids, **inputs)
        for hook in hooks:
            hook.remove()
        return seen

    gold, dense = layer_outputs(copy.deepcopy(model).double()), layer_outputs(model)
    sparse_layers = []
    host.attach(
        model,
        tiny.gates_for(model),
        "top_k:1.0",
        min_tokens=0,
        observe=lambda layer, call, selection: sparse_layers.append(layer),
    )
    now = layer_outputs(model)
    assert sparse_layers == [0, 2]
    assert len(now) == len(dense) == 3 * 4
    for actual, expected, exact in zip(now, dense, gold, strict=True):
        tiny.assert_as_close(actual, expected, exact)
