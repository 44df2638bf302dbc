"""A padded batch is one call per layer and op, equal to its rows alone."""

import pytest
import torch
from transformers import DynamicCache

from seerattention import baselines
from seerattention.hosts import transformers as host

LENGTHS = (70, 33, 1, 16, 17, 48, 64, 63, 65, 5, 70, 32, 31, 15, 49, 2)


def padded(tiny, side, lengths=LENGTHS, width=70):
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(width - length, None) if side == "left" else slice(0, length)
        ids[row, place] = tiny.tokens(1, length, seed=row)
        mask[row, place] = 1
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("of", ["llama", "qwen2-mixed", "gpt_oss"])
def test_as_many_calls_as_for_one_row(tiny, ops, of, side):
    model, gold = tiny.make(of), tiny.make(of).double()
    ids, inputs = padded(tiny, side)
    for one in (model, gold):
        host.attach(one, tiny.gates_for(one), "threshold:0.2", min_tokens=0)
    batch = tiny.logits(model, ids, **inputs)
    for_batch = ops.taken()
    tiny.logits(model, ids[:1])
    assert for_batch == ops.taken()
    assert for_batch["select_blocks"] == for_batch["block_sparse_attention"] == 2
    for row, real in enumerate(inputs["attention_mask"].bool()):
        own = ids[row, real][None]
        tiny.assert_as_close(batch[row, real], tiny.logits(model, own)[0], tiny.logits(gold, own)[0])


# Where padding is between tokens, transformers' windows count it and ours do not.
@pytest.mark.parametrize(("of", "side"), [("llama", "left"), ("llama", "right"), ("gemma3_text", "left")])
def test_decoding_and_dense_prefill_are_one_call(tiny, ops, of, side):
    model, gold = tiny.make(of), tiny.make(of).double()
    ids, inputs = padded(tiny, side)
    dense, exact, steps = [], [], tiny.tokens(16, 4, seed=9)
    mask = torch.cat([inputs["attention_mask"], torch.ones(16, 4, dtype=torch.long)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(model, caches):
        cache, outs = caches, []
        for columns in (slice(0, 70), slice(70, 71), slice(71, 74)):
            part = torch.cat([ids, steps], 1)[:, columns]
            more = {"attention_mask": mask[:, : columns.stop], "position_ids": positions[:, columns]}
            outs.append(tiny.logits(model, part, cache=cache, **more))
            counted.append(ops.taken())
        return torch.cat(outs, 1)

    counted = []
    dense = run(model, DynamicCache(config=model.config))
    exact = run(gold, DynamicCache(config=model.config))
    host.attach(model, tiny.gates_for(model), "threshold:0.2", min_tokens=1000)
    counted = []
    out = run(model, DynamicCache(config=model.config))
    layers = model.config.num_hidden_layers
    for found in counted:
        assert found.pop("dense_attention") == layers
        assert "select_blocks" not in found
    real = mask.bool()
    tiny.assert_as_close(out[real], dense[real], exact[real])


@pytest.mark.parametrize("name", ["quest", "streaming", "meanpool"])
def test_baselines(tiny, ops, name):
    model, gold = tiny.make(), tiny.make().double()
    ids, inputs = padded(tiny, "left")
    for one in (model, gold):
        scorer = baselines.create(name, block_size=(16, 16))
        host.attach(one, scorer, "threshold:0.2", min_tokens=0)
    batch = tiny.logits(model, ids, **inputs)
    assert ops.taken()["select_blocks"] == 2
    for row, real in enumerate(inputs["attention_mask"].bool()):
        own = ids[row, real][None]
        tiny.assert_as_close(batch[row, real], tiny.logits(model, own)[0], tiny.logits(gold, own)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_short_rows_are_dense_in_one_call_long_ones_sparse_in_another(tiny, ops, side):
    model, gold = tiny.make(), tiny.make().double()
    ids, inputs = padded(tiny, side)
    for one in (model, gold):
        host.attach(one, tiny.gates_for(one), "threshold:0.2", min_tokens=40)
    batch = tiny.logits(model, ids, **inputs)
    assert host.usage(model) == {"sparse": 2, "dense: fewer than 40 tokens": 2}
    counted = ops.taken()
    assert counted["select_blocks"] == counted["block_sparse_attention"] == counted["dense_attention"] == 2
    for row, real in enumerate(inputs["attention_mask"].bool()):
        own = ids[row, real][None]
        tiny.assert_as_close(batch[row, real], tiny.logits(model, own)[0], tiny.logits(gold, own)[0])


@pytest.mark.parametrize("implementation", [None, "static"])
def test_a_conversation_of_a_padded_batch(tiny, implementation):
    """Prompts of many lengths, answers, and a second turn: as every conversation alone."""
    lengths = (50, 33, 16, 48)
    model, gold = tiny.make(), tiny.make().double()
    for one in (model, gold):
        host.attach(one, tiny.gates_for(one), "threshold:0.25", min_tokens=0)
    ids, _ = padded(tiny, "left", lengths, 50)
    steps, turn = tiny.tokens(4, 20, seed=11), tiny.tokens(4, 40, seed=12)
    whole = torch.cat([ids, steps, turn], 1)
    mask = torch.cat([(ids > 0).long(), torch.ones(4, 60, dtype=torch.long)], 1)

    def run(model, ids, mask, bounds):
        cache, outs = DynamicCache(config=model.config), []
        for start, end in zip((0, *bounds), (*bounds, ids.shape[1]), strict=True):
            positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
            more = {"attention_mask": mask[:, :end], "position_ids": positions}
            outs.append(tiny.logits(model, ids[:, start:end], cache=cache, **more))
        return torch.cat(outs, 1)

    bounds = range(50, 71)
    together = run(model, whole, mask, bounds)
    assert set(host.usage(model)) == {"sparse", "dense: decoding step"}
    for row, length in enumerate(lengths):
        own, its = whole[row : row + 1, 50 - length :], mask[row : row + 1, 50 - length :]
        its_bounds = [end - 50 + length for end in bounds]
        alone, exact = (run(one, own, its, its_bounds) for one in (model, gold))
        tiny.assert_as_close(together[row, 50 - length :], alone[0], exact[0])


def test_rows_without_new_tokens_and_without_any(tiny):
    model, ids = tiny.make(), tiny.tokens(3, 64)
    host.attach(model, tiny.gates_for(model), "threshold:0.2", min_tokens=0)
    mask = torch.ones(3, 64, dtype=torch.long)
    mask[1, 32:] = 0
    mask[2] = 0
    cache = DynamicCache(config=model.config)
    outs = [
        tiny.logits(model, ids[:, part], cache=cache, attention_mask=mask[:, : part.stop])
        for part in (slice(0, 32), slice(32, 64))
    ]
    alone = DynamicCache(config=model.config)
    gold = tiny.make().double()
    host.attach(gold, tiny.gates_for(gold), "threshold:0.2", min_tokens=0)
    gold_cache = DynamicCache(config=model.config)
    for part, out in zip((ids[:1, :32], ids[:1, 32:]), outs, strict=True):
        expected = tiny.logits(model, part, cache=alone)
        tiny.assert_as_close(out[:1], expected, tiny.logits(gold, part, cache=gold_cache))
    nothing = tiny.logits(model, ids[:, :5], cache=cache, attention_mask=torch.zeros(3, 69))
    assert nothing.isfinite().all()


def test_gradients_of_a_padded_batch_are_those_of_its_rows(tiny):
    ids, inputs = padded(tiny, "left", (70, 33, 17))
    real, found = inputs["attention_mask"].bool(), []
    model = tiny.make().double()
    host.attach(model, tiny.gates_for(model), "threshold:0.2", min_tokens=0)
    weight = model.model.layers[0].self_attn.k_proj.weight
    model(ids, **inputs).logits[real].square().sum().backward()
    found.append(weight.grad)
    weight.grad = None
    for row in range(3):
        model(ids[row, real[row]][None]).logits.square().sum().backward()
    tiny.assert_as_close(found[0].float(), weight.grad.float(), weight.grad)
