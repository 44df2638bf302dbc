"""intercept on a plain and on an attached model, and what it leaves behind."""

import pytest
import torch

from seerattention.hosts import transformers as host


def dense(call):
    return call.dense()


def test_plain_model(tiny, kind):
    model, ids = tiny.make(kind), tiny.tokens(2, 30)
    before, gold, keys = tiny.logits(model, ids), tiny.gold_logits(model, ids), list(model.state_dict())
    layers = []

    def handler(call):
        layers.append(call.layer)
        return dense(call)

    with host.intercept(model, handler) as same:
        assert same is model
        assert not host.attached(model)
        assert list(model.state_dict()) == keys
        tiny.assert_as_close(tiny.logits(model, ids), before, gold)
    assert layers == tiny.full_layers(model)
    assert torch.equal(tiny.logits(model, ids), before)
    assert "_seerattention_runtime" not in vars(model)


def test_attached_model(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 70)
    before, gold = tiny.logits(model, ids), tiny.gold_logits(model, ids)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    sparse = tiny.logits(model, ids)
    with host.intercept(model, dense):
        assert host.attached(model)
        tiny.assert_as_close(tiny.logits(model, ids), before, gold)
    assert torch.equal(tiny.logits(model, ids), sparse)
    assert host.usage(model) == {"sparse": 4}


def test_nested(tiny):
    model, ids, order = tiny.make(), tiny.tokens(1, 10), []

    def named(name):
        def handler(call):
            order.append(name)
            return dense(call)

        return handler

    with host.intercept(model, named("outer")):
        with host.intercept(model, named("inner")):
            tiny.logits(model, ids)
        tiny.logits(model, ids)
    assert order == ["inner"] * 2 + ["outer"] * 2


class StoppedError(Exception):
    pass


def stop(call):
    raise StoppedError


@pytest.mark.parametrize("attached", [False, True])
def test_exceptions_leave_the_model_as_before(tiny, attached):
    model, ids = tiny.make(), tiny.tokens(1, 70)
    if attached:
        host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    before = tiny.logits(model, ids)
    implementation = model.config._attn_implementation
    with pytest.raises(StoppedError), host.intercept(model, stop):
        tiny.logits(model, ids)
    assert torch.equal(tiny.logits(model, ids), before)
    assert model.config._attn_implementation == implementation
    assert host.attached(model) == attached


@pytest.mark.parametrize("attached", [False, True])
def test_attach_and_detach_inside_are_refused(tiny, attached):
    model, ids = tiny.make(), tiny.tokens(1, 70)
    gates = tiny.gates_for(model)
    if attached:
        host.attach(model, gates, "top_k:0.8", min_tokens=0)
    before = tiny.logits(model, ids)
    with host.intercept(model, dense):
        with pytest.raises(ValueError, match=r"is intercepted; leave intercept"):
            host.attach(model, gates, "top_k:0.1")
        with pytest.raises(ValueError, match="is intercepted" if attached else "nothing is attached"):
            host.detach(model)
    assert torch.equal(tiny.logits(model, ids), before)


def test_padding_is_taken_off(tiny):
    model, ids = tiny.make(), tiny.tokens(2, 20)
    mask = torch.ones(2, 20)
    mask[0, :7] = 0
    calls = []

    def handler(call):
        calls.append(call)
        return dense(call)

    with host.intercept(model, handler):
        tiny.logits(model, ids, attention_mask=mask)
    assert [(c.layer, c.slot, c.q.shape[2], c.k_nope.shape[2]) for c in calls] == [
        (0, 0, 13, 13),
        (0, 1, 20, 20),
        (1, 0, 13, 13),
        (1, 1, 20, 20),
    ]
    assert torch.equal(calls[0].positions, torch.arange(13))


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_under_autocast_handlers_get_one_precision_and_choose_their_own(tiny, shape):
    """Rotations and norms give fp32 where projections gave bfloat16; dense attention comes out as without."""
    model, ids = tiny.make(shape), tiny.tokens(1, 70)
    seen = []

    def handler(call):
        seen.append({x.dtype for x in (call.q, call.k, call.v, call.q_nope, call.k_nope)})
        assert not torch.is_autocast_enabled("cpu")
        return dense(call)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(ids).logits
        with host.intercept(model, handler):
            after = model(ids).logits
        host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
        sparse = model(ids).logits
    assert seen == [{torch.bfloat16}] * 2
    tiny.assert_as_close(after, before, tiny.gold_logits(host.detach(model), ids))
    assert not torch.equal(sparse, before)
