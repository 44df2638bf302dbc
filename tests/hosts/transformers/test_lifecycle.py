"""Gates by name, the model's own attention for a while, and what stays when adapters come and go."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from transformers import DynamicCache

from seerattention import baselines
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.attach import active
from seerattention.hosts.transformers.base import device_of
from seerattention.hosts.transformers.rotary import model_rotary
from seerattention.policies import TopK


@pytest.fixture
def two(tiny):
    """A model with gates 'default' and 'coarse', a prompt, and what each gives when attached alone."""
    model, ids = tiny.make(), tiny.tokens(1, 100)
    fine, coarse = tiny.gates_for(model), host.new_gates(model, block_size=32, init="random")
    alone = {}
    for name, gates, policy in (("default", fine, "top_k:0.8"), ("coarse", coarse, "top_k:0.4")):
        host.attach(model, gates, policy, min_tokens=0)
        alone[name] = tiny.logits(model, ids)
    host.attach(model, fine, "top_k:0.8", min_tokens=0)
    host.add_gates(model, "coarse", coarse, "top_k:0.4")
    return model, ids, {"default": fine, "coarse": coarse}, alone


def test_gates_by_name(tiny, two):
    model, ids, gates, alone = two
    assert not torch.equal(alone["default"], alone["coarse"])
    for name in ("default", "coarse", "coarse", "default"):
        host.set_gates(model, name)
        assert torch.equal(tiny.logits(model, ids), alone[name])
        for index, gate in gates[name].items():
            assert model.model.layers[index].self_attn.attn_gate is gate
    shapes = {v.shape for k, v in model.state_dict().items() if "attn_gate.linear_k" in k}
    assert shapes == {dict(gates["default"].items())[0].linear_k.weight.shape}


def test_each_set_keeps_its_policy(tiny, two):
    model, ids, _, alone = two
    host.set_policy(model, "top_k:0.9")
    changed = tiny.logits(model, ids)
    host.set_gates(model, "coarse")
    assert torch.equal(tiny.logits(model, ids), alone["coarse"])
    host.set_gates(model, "default")
    assert torch.equal(tiny.logits(model, ids), changed)


def test_the_policy_of_added_gates(tiny):
    """Their own, else the one saved with them, else the current one."""
    model = tiny.make()
    host.attach(model, tiny.gates_for(model), "top_k:0.8")
    saved = tiny.gates_for(model)
    saved.policy = "top_p:0.5"
    host.add_gates(model, "saved", saved)
    host.add_gates(model, "given", saved, TopK(0.7))
    host.add_gates(model, "current", tiny.gates_for(model))
    for name, policy in (("saved", "top_p:0.5"), ("given", "top_k:0.7"), ("current", "top_k:0.8")):
        host.set_gates(model, name)
        assert str(active(model).policy) == policy


def test_a_baseline_beside_gates(tiny, two):
    model, ids, _, alone = two
    host.add_gates(model, "quest", baselines.create("quest", block_size=(16, 16)), "top_k:0.8")
    host.set_gates(model, "quest")
    assert not any("attn_gate" in key for key in model.state_dict())
    assert not torch.equal(tiny.logits(model, ids), alone["default"])
    host.set_gates(model, "default")
    assert torch.equal(tiny.logits(model, ids), alone["default"])


def test_names_that_do_not_fit(tiny, two):
    model, ids, gates, alone = two
    with pytest.raises(ValueError, match="gates named 'coarse' already; choose another name"):
        host.add_gates(model, "coarse", gates["coarse"])
    with pytest.raises(ValueError, match="no gates named 'best'; there are 'default', 'coarse'"):
        host.set_gates(model, "best")
    with pytest.raises(ValueError, match=r"made for an unnamed model.*fingerprint"):
        host.add_gates(model, "other", tiny.gates_for(tiny.make(seed=1)))
    with pytest.raises(TypeError, match="policy must be a Policy or text"):
        host.set_policy(model, 0.1)
    with pytest.raises(TypeError, match="scorers must be Gates or a Scorer"):
        host.add_gates(model, "folder", "gates/")
    assert torch.equal(tiny.logits(model, ids), alone["default"])
    for call in (
        lambda m: host.set_gates(m, "default"),
        lambda m: host.add_gates(m, "more", gates["default"]),
        lambda m: host.dense(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="nothing is attached to this model; call attach"):
            call(tiny.make())


def test_attaching_again_replaces_every_set(tiny, two):
    model, ids, gates, alone = two
    host.set_gates(model, "coarse")
    host.attach(model, gates["default"], "top_k:0.8", name="mine", min_tokens=0)
    assert torch.equal(tiny.logits(model, ids), alone["default"])
    with pytest.raises(ValueError, match="no gates named 'coarse'; there are 'mine'"):
        host.set_gates(model, "coarse")


def test_a_copy_has_sets_of_its_own(tiny, two):
    model, ids, _, alone = two
    twin = copy.deepcopy(model)
    host.set_gates(twin, "coarse")
    assert torch.equal(tiny.logits(twin, ids), alone["coarse"])
    assert torch.equal(tiny.logits(model, ids), alone["default"])


def test_pickles_of_a_model_and_its_cache(tiny, two):
    model, ids, _, _ = two

    def second_turn(model, between):
        cache = DynamicCache(config=model.config)
        tiny.logits(model, ids[:, :64], cache=cache)
        return tiny.logits(model, ids[:, 64:], cache=between(cache))

    gold = second_turn(copy.deepcopy(model).double(), copy.deepcopy)
    expected = second_turn(model, copy.deepcopy)
    read = pickle.loads(pickle.dumps(model))
    assert torch.equal(second_turn(read, copy.deepcopy), expected)
    # A pickled cache has no summaries: they are made from its keys.
    for other in (model, read):
        tiny.assert_as_close(second_turn(other, lambda x: pickle.loads(pickle.dumps(x))), expected, gold)
    assert set(host.usage(read)) == {"sparse"}
    host.detach(read)
    assert torch.equal(tiny.logits(read, ids), tiny.logits(tiny.make(), ids))


@pytest.mark.parametrize("decoded", [0, 3])
def test_other_gates_know_of_keys_that_were_taken_out(tiny, two, decoded):
    """Chosen among those attached, or attached anew; of a cropped cache nothing was taken out."""
    model, ids, gates, _ = two
    for start, changed in ((20, "dense: cached keys have no summaries"), (60, "sparse")):
        for change in (
            lambda: host.set_gates(model, "coarse"),
            lambda: host.attach(model, gates["default"], "top_k:0.8", min_tokens=0),
        ):
            cache = DynamicCache(config=model.config)
            tiny.logits(model, ids[:, :64], cache=cache)
            for layer in cache.layers:
                layer.keys, layer.values = (
                    torch.cat((x[:, :, :start], x[:, :, start + 4 :]), 2) for x in (layer.keys, layer.values)
                )
            change()
            for token in range(decoded):
                tiny.logits(model, ids[:, token : token + 1], cache=cache)
            before = Counter(host.usage(model))
            tiny.logits(model, ids[:, 64:], cache=cache)
            assert [how for how in Counter(host.usage(model)) - before if how.startswith(changed)]
            host.attach(model, gates["default"], "top_k:0.8", min_tokens=0)
            host.add_gates(model, "coarse", gates["coarse"], "top_k:0.4")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_gates_of_a_copied_model_are_that_copys(tiny, two, way):
    twin, other = way(two[0]), tiny.make()
    for name in ("coarse", "default"):
        host.set_gates(twin, name)
        gates = active(twin).scorers
        with pytest.raises(ValueError, match="attached to another model"):
            host.attach(other, gates, "top_k:0.8")
    host.detach(twin)
    host.attach(other, gates, "top_k:0.8")


def test_pickles_of_gates_that_are_attached(tiny, two):
    model, ids, gates, alone = two
    read = pickle.loads(pickle.dumps(gates["default"]))
    other = host.attach(tiny.make(), read, "top_k:0.8", min_tokens=0)
    assert torch.equal(tiny.logits(other, ids), alone["default"])
    assert torch.equal(tiny.logits(model, ids), alone["default"])


def test_saving_what_a_model_uses(tiny, two, tmp_path):
    model, ids, _, alone = two
    host.set_gates(model, "coarse")
    host.save_gates(model, tmp_path / "gates")
    loaded = host.load_gates(tmp_path / "gates")
    assert loaded.policy == "top_k:0.4"
    host.detach(model)
    host.attach(model, loaded, min_tokens=0)
    assert torch.equal(tiny.logits(model, ids), alone["coarse"])
    host.attach(model, baselines.create("quest"), "top_k:0.8")
    with pytest.raises(TypeError, match="which is not gates and has no weights to save"):
        host.save_gates(model, tmp_path / "quest")
    with pytest.raises(ValueError, match="nothing is attached"):
        host.save_gates(tiny.make(), tmp_path / "nothing")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_is_the_models_own_attention(tiny, kind, implementation):
    model, ids = tiny.make(kind), tiny.tokens(2, 50)
    if implementation == "sdpa" and not model._supports_sdpa:
        implementation = "eager"
    model.set_attn_implementation(implementation)
    plain = tiny.logits(model, ids)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    sparse = tiny.logits(model, ids)
    before = host.usage(model)
    with host.dense(model) as same:
        assert same is model
        assert torch.equal(tiny.logits(model, ids), plain)
        with host.dense(model):
            assert torch.equal(tiny.logits(model, ids), plain)
        assert torch.equal(tiny.logits(model, ids), plain)
        assert host.attached(model)
    assert host.usage(model) == before
    assert torch.equal(tiny.logits(model, ids), sparse)


def test_dense_can_what_only_dense_attention_can(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 30)
    model.set_attn_implementation("eager")
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    with host.dense(model):
        assert model(ids, output_attentions=True).attentions[0].shape == (1, 4, 30, 30)
    with pytest.raises(ValueError, match="whole attention map"):
        model(ids, output_attentions=True)


def test_what_dense_forbids_and_allows(tiny, two):
    model, ids, gates, alone = two
    with pytest.raises(RuntimeError, match="mine"), host.dense(model):  # noqa: PT012
        for call in (
            lambda: host.detach(model),
            lambda: host.attach(model, gates["default"], "top_k:0.8"),
            lambda: host.intercept(model, print).__enter__(),
        ):
            with pytest.raises(ValueError, match=r"dense for the moment; leave dense\(model\) first"):
                call()
        host.set_gates(model, "coarse")
        raise RuntimeError("mine")
    assert torch.equal(tiny.logits(model, ids), alone["coarse"])
    with (
        host.intercept(model, lambda call: call.dense()),
        pytest.raises(ValueError, match=r"intercepted; leave intercept"),
        host.dense(model),
    ):
        pass
    assert torch.equal(tiny.logits(model, ids), alone["coarse"])


def test_dense_answers_compared_on_one_cache(tiny, two):
    """A document read densely once, asked both ways."""
    model, ids, _, _ = two
    cache = DynamicCache(config=model.config)
    with host.dense(model):
        tiny.logits(model, ids[:, :64], cache=cache)
        dense = tiny.logits(model, ids[:, 64:], cache=copy.deepcopy(cache))
    sparse = tiny.logits(model, ids[:, 64:], cache=cache)
    assert host.usage(model) == {"sparse": 2}
    assert not torch.equal(dense, sparse)
    host.set_policy(model, "top_k:1")
    cache.crop(-36)
    everything = tiny.logits(model, ids[:, 64:], cache=cache)
    tiny.assert_as_close(everything, dense, tiny.gold_logits(tiny.make(), ids)[:, 64:])


def test_taps_follow_a_module_that_was_replaced(tiny, kind):
    """As adapters do, where the new module wraps the old one, so that a hook on that would be stale."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    results = []
    for order in ("attach first", "replace first"):
        model = tiny.make(kind)
        gates = tiny.gates_for(model)
        if order == "attach first":
            host.attach(model, gates, "top_k:0.8", min_tokens=0)
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "qkv_proj", "q_norm", "k_norm"):
                if hasattr(layer.self_attn, name):
                    setattr(layer.self_attn, name, Doubled(getattr(layer.self_attn, name)))
        if order == "replace first":
            host.attach(model, gates, "top_k:0.8", min_tokens=0, check_base=False)
        seen = []

        def look(call, seen=seen):
            seen.append(call.q_nope)
            return call.dense()

        with host.intercept(model, look):
            tiny.logits(model, tiny.tokens(1, 60))
        results.append((seen, tiny.logits(model, tiny.tokens(1, 60))))
    (seen, out), (expected, expected_out) = results
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert torch.equal(out, expected_out)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_adapters_do_not_change_what_identifies_the_base(tiny):
    from peft import LoraConfig, get_peft_model

    model = tiny.make("qwen2")
    plain, checksum = host.BaseInfo.of(model), host.base_checksum(model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert any("base_layer" in name for name, _ in model.named_parameters())
    assert host.BaseInfo.of(model) == plain
    assert host.base_checksum(model) == checksum
    # Merged, it is another model.
    merged = tuned.merge_and_unload()
    assert host.BaseInfo.of(merged).fingerprint != plain.fingerprint


def test_quantised_weights_have_no_fingerprint(tiny):
    model = tiny.make()
    projection = model.model.layers[0].self_attn.q_proj
    for weight in (projection.weight.to(torch.float8_e4m3fn), (projection.weight * 8).to(torch.int8)):
        other = copy.deepcopy(model)
        other.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        assert host.BaseInfo.of(other).fingerprint == ""
    assert host.BaseInfo.of(model).fingerprint


def test_angles_come_to_the_gates_device(tiny):
    """In a model over several devices accelerate keeps the rotary module's results on one of them."""
    model = tiny.make()
    module = model.model.rotary_emb
    module.forward = lambda x, positions: 2 * (torch.zeros(*positions.shape, 16),)
    cos, sin = model_rotary(model, 16)(torch.zeros(1, 5, dtype=torch.long, device="meta"))
    assert cos.device.type == sin.device.type == "meta"


def test_where_a_module_computes(tiny):
    layer = tiny.make().model.layers[0].self_attn
    assert device_of(layer) == torch.device("cpu")
    for part in layer.modules():
        for name in list(part._parameters):
            part._parameters[name] = torch.nn.Parameter(torch.empty(1, device="meta"))
    layer.q_proj._hf_hook = type("Hook", (), {"execution_device": "meta:0"})()
    assert device_of(layer) == torch.device("meta:0")
    layer.q_proj._hf_hook = type("Hook", (), {"execution_device": "cuda:1"})()
    assert device_of(layer) == torch.device("cuda:1")
    assert device_of(torch.nn.ReLU()) == torch.device("cpu")
