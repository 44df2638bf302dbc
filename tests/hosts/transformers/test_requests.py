"""Requests of several threads on one model, and models of one configuration, never meet."""

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.request import LayerCall, Pass


@pytest.fixture
def model(tiny):
    model = tiny.make()
    return host.attach(model, tiny.gates_for(model), "top_k:0.7", min_tokens=0)


@torch.no_grad()
def sparse(tiny, model, ids):
    return model(ids, use_cache=False).logits


@torch.no_grad()
def cached(tiny, model, ids):
    """A prompt, one more token, and a second turn."""
    cache = DynamicCache(config=model.config)
    parts = ids.split((40, 1, ids.shape[1] - 41), 1)
    return torch.cat([tiny.logits(model, part, cache=cache) for part in parts], 1)


def in_pieces(tiny, model, ids):
    return host.prefill(model, ids, DynamicCache(config=model.config), piece_tokens=32).logits


def generated(tiny, model, ids):
    return model.generate(ids, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def padded(tiny, model, ids):
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, :9] = 0
    return model(ids.repeat(2, 1), attention_mask=mask).logits * mask[..., None]


@torch.no_grad()
def dense(tiny, model, ids):
    with host.dense(model):
        return model(ids).logits


@torch.no_grad()
def dense_generated(tiny, model, ids):
    with host.dense(model):
        return model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")


@torch.no_grad()
def intercepted(tiny, model, ids):
    with host.intercept(model, lambda call: 2 * call.dense()):
        return model(ids).logits


REQUESTS = [sparse, cached, in_pieces, generated, padded, dense, dense_generated, intercepted]


def test_two_hundred_requests_of_two_threads(tiny, model):
    lengths = (60, 75, 96, 60, 130)
    mixed = [(REQUESTS[i % 8], tiny.tokens(1, lengths[i % 5], seed=i)) for i in range(200)]
    alone = [request(tiny, model, ids) for request, ids in mixed]
    counted, begin = host.usage(model), threading.Barrier(2)

    def serve(mine):
        begin.wait(60)
        return [request(tiny, model, ids) for request, ids in mine]

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(serve, (mixed[::2], mixed[1::2])))
    together = [out for pair in zip(*halves, strict=True) for out in pair]
    for (request, _), one, other in zip(mixed, alone, together, strict=True):
        assert torch.equal(one, other), request.__name__
    assert host.usage(model) == {reason: 2 * times for reason, times in counted.items()}


@pytest.mark.parametrize("outer", REQUESTS, ids=lambda r: r.__name__)
@pytest.mark.parametrize("inner", REQUESTS, ids=lambda r: r.__name__)
def test_a_request_within_a_layer_of_another(tiny, model, outer, inner):
    """One thread stops between the hooks of a layer while another one's request comes and goes."""
    first, second = tiny.tokens(1, 70, seed=1), tiny.tokens(1, 70, seed=2)
    alone, found = (outer(tiny, model, first), inner(tiny, model, second)), {}

    def interrupt(module, args, output):
        if "inner" not in found:
            found["inner"] = None
            thread = threading.Thread(target=lambda: found.update(inner=inner(tiny, model, second)))
            thread.start()
            thread.join(60)

    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(interrupt)
    found_outer = outer(tiny, model, first)
    hook.remove()
    assert torch.equal(found_outer, alone[0])
    assert torch.equal(found["inner"], alone[1])


@pytest.mark.parametrize("plain", [True, False])
def test_threads_intercept_one_model(tiny, plain):
    model, ids = tiny.make(), tiny.tokens(1, 50)
    own = tiny.logits(model, ids)
    if not plain:
        host.attach(model, tiny.gates_for(model), "top_k:0.7", min_tokens=0)
    before, both, seen = tiny.logits(model, ids), threading.Barrier(2), {}

    def serve(factor):
        def handler(call):
            both.wait(60)
            return factor * call.dense()

        with host.intercept(model, handler):
            seen[factor] = tiny.logits(model, ids)

    threads = [threading.Thread(target=serve, args=(factor,)) for factor in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    tiny.assert_as_close(seen[1], own, tiny.gold_logits(tiny.make(), ids))
    assert not torch.equal(seen[1], seen[3])
    assert torch.equal(tiny.logits(model, ids), before)
    assert ("_seerattention_runtime" in vars(model)) != plain


def test_what_is_attached_stays_while_others_are_inside(tiny, model):
    inside, leave = threading.Event(), threading.Event()

    def serve():
        with host.dense(model):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    inside.wait(60)
    for change in (host.detach, lambda m: host.attach(m, tiny.gates_for(m), "top_k:0.1")):
        with pytest.raises(ValueError, match="a request of this model is inside dense, intercept or prefill"):
            change(model)
    assert host.attached(model)
    leave.set()
    thread.join(60)
    assert not host.attached(host.detach(model))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("where", ["q_proj", "v_proj", "o_proj", "attention"])
def test_an_exception_leaves_other_requests_right(tiny, model, where):
    ids, alone = tiny.tokens(1, 70), {}
    for request in REQUESTS:
        alone[request] = request(tiny, model, ids)

    def stop(*_):
        raise StoppedError

    def fails():
        if where == "attention":
            with host.intercept(model, stop):
                model(ids)
            return
        hook = getattr(model.model.layers[1].self_attn, where).register_forward_hook(stop)
        try:
            model(ids)
        finally:
            hook.remove()

    for request in REQUESTS:
        with pytest.raises(StoppedError):
            fails()
        assert torch.equal(request(tiny, model, ids), alone[request])


def test_nothing_of_a_call_is_kept(tiny, model):
    """Not on the modules, and not alive after an exception."""
    import gc

    ids = tiny.tokens(1, 70)

    def stop(call):
        raise StoppedError

    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model(ids)
    with pytest.raises(StoppedError), host.intercept(model, stop):
        model(ids)
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) in (LayerCall, Pass)]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def gradient(model, loss):
    loss.backward()
    found = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "attn_gate" not in n])
    model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_are_those_of_their_pass(tiny, model, reentrant):
    """Activation checkpointing repeats layers in the backward pass, when the context may be another."""
    ids = tiny.tokens(1, 64)
    host.attach(model, tiny.gates_for(model), "top_k:0.7", min_tokens=0, backend="reference")
    model.enable_input_require_grads()
    plain = {}
    for request in (sparse, dense, intercepted):
        with torch.enable_grad():
            loss = request.__wrapped__(tiny, model, ids).square().mean()
        plain[request] = gradient(model, loss)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for request in (sparse, dense, intercepted):
        loss = request.__wrapped__(tiny, model, ids).square().mean()
        # In a thread of its own, as torch computes the gradients of a GPU.
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(gradient, model, loss).result(60)
        assert torch.equal(again, plain[request]), request.__name__
    loss = sparse.__wrapped__(tiny, model, ids).square().mean()
    with (
        pytest.raises(RuntimeError, match="a sparse layer is computed again inside dense"),
        host.dense(model),
    ):
        loss.backward()


def pair():
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return config, [LlamaForCausalLM(config).eval() for _ in range(3)]


@pytest.mark.parametrize("order", sorted(set(itertools.permutations((0, 1, 0, 1)))))
def test_models_of_one_configuration(tiny, order):
    """Attached and detached in every order; what is attached is sparse, what is not is as it was."""
    config, models = pair()
    saved, ids = copy.deepcopy(config.__dict__), tiny.tokens(1, 60)
    plain = [tiny.logits(one, ids) for one in models]
    gates = [tiny.gates_for(one) for one in models]
    sparse = []
    for one, its in zip(models, gates, strict=True):
        host.attach(one, its, "top_k:0.7", min_tokens=0)
        sparse.append(tiny.logits(one, ids))
        host.detach(one)
    on = set()
    for which in order:
        if which in on:
            host.detach(models[which])
        else:
            host.attach(models[which], gates[which], "top_k:0.7", min_tokens=0)
        on ^= {which}
        for i, one in enumerate(models):
            assert torch.equal(tiny.logits(one, ids), (sparse if i in on else plain)[i])
    assert all(one.config is config and one.model.config is config for one in models)
    assert config.__dict__ == saved


def test_changes_of_a_configuration_reach_an_attached_model(tiny, model):
    ids = tiny.tokens(1, 60)
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    model.model.config.use_cache = True
    assert model(ids).past_key_values is not None
    model.config._attn_implementation = "sdpa"
    model.set_attn_implementation("eager")
    before = host.usage(model)
    model(ids)
    assert host.usage(model)["sparse"] == before["sparse"] + 2
    with host.dense(model):
        assert model(ids, output_attentions=True).attentions[0] is not None
    assert host.detach(model).config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_a_model_made_from_an_attached_models_configuration_is_plain(tiny, model):
    ids, mask = tiny.tokens(2, 60), torch.ones(2, 60)
    mask[0, :7] = 0
    for config in (model.config, model.model.config):
        torch.manual_seed(0)
        own = LlamaForCausalLM(copy.deepcopy(config)).eval()
        torch.manual_seed(0)
        shared = LlamaForCausalLM(config).eval()
        assert own.config._attn_implementation == "sdpa"
        inputs = {"attention_mask": mask}
        assert torch.equal(tiny.logits(own, ids, **inputs), tiny.logits(shared, ids, **inputs))
    host.detach(model)
    assert model.config._attn_implementation == "sdpa"
