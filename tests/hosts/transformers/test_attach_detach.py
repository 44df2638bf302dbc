"""attach and detach leave nothing behind; what cannot be done is refused in one sentence."""

import copy
import gc

import pytest
import torch
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from seerattention import baselines
from seerattention.hosts import transformers as host
from seerattention.policies import TopK


def state(model):
    """Everything that attach may touch, by identity where identity matters."""
    hooks = [
        (name, attribute, dict(getattr(module, attribute)))
        for name, module in model.named_modules()
        for attribute in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
                          "_forward_pre_hooks_with_kwargs")
    ]  # fmt: skip
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    configs = [m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)]
    return (
        [(n, id(m)) for n, m in model.named_modules()],
        hooks,
        attributes,
        configs,
        list(model.state_dict()),
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_detach_leaves_the_model_as_it_was(tiny, kind, implementation):
    model, ids = tiny.make(kind), tiny.tokens(2, 50)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa for it")
    model.set_attn_implementation(implementation)
    before, dense, checksum = state(model), tiny.logits(model, ids), host.base_checksum(model)
    assert host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0) is model
    assert host.attached(model)
    assert state(model) != before
    assert not torch.equal(tiny.logits(model, ids), dense)
    assert host.base_checksum(model) == checksum
    assert host.detach(model) is model
    assert not host.attached(model)
    assert state(model) == before
    assert torch.equal(tiny.logits(model, ids), dense)
    assert host.base_checksum(model) == checksum


def test_gates_are_child_modules(tiny, kind):
    model = tiny.make(kind)
    before = set(model.state_dict())
    gates = tiny.gates_for(model)
    host.attach(model, gates, "top_k:0.5")
    layers = [index for index, _ in gates.items()]
    added = set(model.state_dict()) - before
    assert added == {
        f"model.layers.{i}.self_attn.attn_gate.{name}.weight"
        for i in layers
        for name in ("linear_q", "linear_k")
    }
    assert layers == tiny.full_layers(model)


def test_attaching_again_replaces(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 70)
    before = state(model)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    first = tiny.logits(model, ids)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    assert torch.equal(tiny.logits(model, ids), first)
    assert host.usage(model) == {"sparse": 2}
    host.attach(model, baselines.create("streaming", block_size=(16, 16)), "top_k:0.8", min_tokens=0)
    assert not any("attn_gate" in key for key in model.state_dict())
    host.detach(model)
    assert state(model) == before


def test_a_failed_attach_leaves_what_was_attached(tiny):
    model = tiny.make()
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    before = state(model)
    for scorers, policy, more, error in (
        ("gates/", "top_k:0.1", {}, TypeError),
        (tiny.gates_for(model), 0.1, {}, TypeError),
        (tiny.gates_for(model), None, {}, ValueError),
        (tiny.gates_for(model), "top_k:2", {}, ValueError),
        (tiny.gates_for(tiny.make(seed=1)), "top_k:0.1", {}, ValueError),
        (tiny.gates_for(model), "top_k:0.1", {"backend": "warp"}, ValueError),
        (tiny.gates_for(model), "top_k:0.1", {"min_tokens": -1}, ValueError),
        (tiny.gates_for(model), "top_k:0.1", {"min_tokens": "1k"}, ValueError),
    ):
        with pytest.raises(error):
            host.attach(model, scorers, policy, **more)
        assert state(model) == before


@pytest.mark.parametrize("model", ["org/model", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model):
    scorer = baselines.create("quest")
    for call in (lambda: host.attach(model, scorer, "top_k:0.1"), lambda: host.new_gates(model)):
        with pytest.raises(TypeError, match=rf"one of transformers, got a {type(model).__name__}; load it"):
            call()


def test_partial_rotary_is_refused_before_anything_changes(tiny):
    model = tiny.make()
    gates = tiny.gates_for(model)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:4]
    before = state(model)
    with pytest.raises(NotImplementedError, match=r"rotates 8 of 16 .* use GateConfig\(rope=False\)"):
        host.attach(model, gates, "top_k:0.1")
    assert state(model) == before
    host.attach(model, tiny.gates_for(model, rope=False), "top_k:0.1")


def test_deep_copy_of_an_attached_model(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 70)
    dense = tiny.logits(model, ids)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    sparse = tiny.logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.logits(twin, ids), sparse)
    assert host.usage(model) == host.usage(twin) | {"sparse": 2}
    host.detach(twin)
    assert torch.equal(tiny.logits(twin, ids), dense)
    assert torch.equal(tiny.logits(model, ids), sparse)


def test_set_policy_and_nothing_attached(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 70)
    for call in (host.detach, host.usage, lambda m: host.set_policy(m, "top_k:0.1")):
        with pytest.raises(ValueError, match=r"nothing is attached .* call attach"):
            call(model)
    dense = tiny.logits(model, ids)
    gold = tiny.gold_logits(model, ids)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    sparse = tiny.logits(model, ids)
    host.set_policy(model, TopK(1.0))
    tiny.assert_as_close(tiny.logits(model, ids), dense, gold)
    host.set_policy(model, "top_k:0.8")
    assert torch.equal(tiny.logits(model, ids), sparse)
    with pytest.raises(ValueError, match="unknown policy 'best:1'; write one of"):
        host.set_policy(model, "best:1")


def test_output_attentions_refused(tiny):
    model, ids = tiny.attach_full(tiny.make()), tiny.tokens(1, 20)
    for call in (
        lambda: model(ids, output_attentions=True),
        lambda: model.model(ids, output_attentions=True),
        lambda: model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True),
    ):
        with pytest.raises(ValueError, match=r"whole attention map.*detach\(model\)"):
            call()
    model = tiny.make()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    tiny.attach_full(model)
    with pytest.raises(ValueError, match="output_attentions needs the whole attention map"):
        model(ids)


def test_empty_prompt_refused(tiny):
    model = tiny.attach_full(tiny.make())
    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match=r"empty prompt: input_ids is \[1, 0\]; give at least one token"):
        model(empty)
    with pytest.raises(ValueError, match="empty prompt: input_ids"):
        model.model(empty)
    with pytest.raises(ValueError, match="empty prompt: inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 0, 64))


def test_attention_dropout_refused(tiny):
    model = tiny.attach_full(tiny.make(attention_dropout=0.1))
    ids = tiny.tokens(1, 20)
    assert tiny.logits(model, ids).isfinite().all()
    model.train()
    with pytest.raises(
        NotImplementedError, match=r"dropout \(0.1\) is not supported; set attention_dropout=0"
    ):
        tiny.logits(model, ids)


def test_masks_of_other_kinds_refused(tiny):
    model, ids = tiny.attach_full(tiny.make()), tiny.tokens(2, 20)
    four = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"\[2, 1, 20, 20\].*detach\(model\) first"):
        tiny.logits(model, ids, attention_mask=four)
    cache = DynamicCache(config=model.config)
    tiny.logits(model, ids, cache=cache)
    short = torch.ones(2, 5)
    short[0, 0] = 0
    with pytest.raises(ValueError, match=r"covers 5 tokens, but there are 25; give one that covers"):
        tiny.logits(model, tiny.tokens(2, 5), attention_mask=short, cache=cache)


def test_packed_sequences_refused(tiny):
    model, ids = tiny.attach_full(tiny.make()), tiny.tokens(1, 20)
    packed = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with pytest.raises(NotImplementedError, match=r"jump after token 11: .* padded batch"):
        tiny.logits(model, ids, position_ids=packed)
    shifted = torch.arange(5, 25)[None]
    assert torch.isfinite(tiny.logits(model, ids, position_ids=shifted)).all()


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (GPT2LMHeadModel, GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)),
        (
            GemmaForCausalLM,
            GemmaConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=16),
        ),
    ],
)  # fmt: skip
def test_family_without_a_file_refused(model_class, config):
    model = model_class(config)
    expected = rf"'{config.model_type}' has no family file; .*llama.* write families/{config.model_type}.py"
    for call in (
        lambda: host.attach(model, baselines.create("quest"), "top_k:0.1"),
        lambda: host.new_gates(model),
        lambda: host.intercept(model, print).__enter__(),
    ):
        with pytest.raises(NotImplementedError, match=expected):
            call()


def test_sliding_windows_only_is_refused(tiny):
    model, ids = tiny.make("mistral-sliding"), tiny.tokens(1, 60)
    before, dense = state(model), tiny.logits(model, ids)
    with pytest.raises(
        ValueError, match=r"no full-attention layer \(sliding_window=24\).*sliding_window=None"
    ):
        host.new_gates(model)
    with pytest.raises(ValueError, match="no full-attention layer"):
        host.attach(model, baselines.create("quest"), "top_k:0.1")
    assert state(model) == before
    assert torch.equal(tiny.logits(model, ids), dense)


def test_layers_of_another_type_refused(tiny):
    model = tiny.make("qwen2-mixed")
    model.config.layer_types[1] = "chunked_attention"
    with pytest.raises(NotImplementedError, match="type chunked_attention are not supported; layers must be"):
        host.new_gates(model)


def test_gates_for_another_model_refused(tiny):
    model = tiny.make()
    gates = tiny.gates_for(model)
    gates.base.__dict__["name"] = "some/model"
    other = tiny.make(seed=1)
    with pytest.raises(ValueError, match=r"for some/model, not for this model: its attention weights differ"):
        host.attach(other, gates, "top_k:0.1")
    host.attach(other, gates, "top_k:0.1", check_base=False)
    for changes, phrase in (
        ({"num_key_value_heads": 4}, "num_kv_heads is 4, not 2"),
        ({"num_hidden_layers": 3}, "num_layers is 3, not 2"),
        ({"head_dim": 32}, "head_dim is 32, not 16"),
    ):
        for check in (True, False):
            with pytest.raises(ValueError, match=f"{phrase}.*Load that model, or distil gates"):
                host.attach(tiny.make(**changes), gates, "top_k:0.1", check_base=check)
    with pytest.raises(ValueError, match="model_type is qwen2, not llama"):
        host.attach(tiny.make("qwen2"), gates, "top_k:0.1")


def test_only_the_name_differs(tiny):
    """People keep local copies: what the weights say counts."""
    model = tiny.make()
    gates = tiny.gates_for(model)
    model.config._name_or_path = "/somewhere/else"
    host.attach(model, gates, "top_k:0.1")
    assert host.attached(model)


def test_gates_of_the_wrong_shape_or_layers_refused(tiny):
    model = tiny.make()
    good = tiny.gates_for(model)
    wide = host.Gates(type(good.config)(8, 2, 16), good.base, [0, 1])
    with pytest.raises(ValueError, match="num_heads=8, the model has 4"):
        host.attach(model, wide, "top_k:0.1")
    with pytest.raises(ValueError, match=r"for layers \[1\]; the model's full-attention layers are \[0, 1\]"):
        host.attach(model, host.Gates(good.config, good.base, [1]), "top_k:0.1")


def test_the_policy_saved_with_the_gates(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 70)
    gates = tiny.gates_for(model)
    with pytest.raises(ValueError, match="saved without a policy; pass one"):
        host.attach(model, gates)
    gates.policy = "top_k:0.8"
    host.attach(model, gates, min_tokens=0)
    by_default = tiny.logits(model, ids)
    host.attach(model, gates, "top_k:0.8", min_tokens=0)
    assert torch.equal(tiny.logits(model, ids), by_default)


def test_gates_that_are_not_finite_are_refused(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 60)
    good, bad = tiny.gates_for(model), tiny.gates_for(model)
    host.attach(model, good, "top_k:0.4", min_tokens=0)
    before = tiny.logits(model, ids)
    with torch.no_grad():
        bad.layers["0"].linear_q.weight[0, 0, 0] = float("nan")
    for call in (
        lambda: host.attach(model, bad, "top_k:0.4"),
        lambda: host.add_gates(model, "bad", bad),
    ):
        with pytest.raises(ValueError, match=r"layers.0.*linear_q.weight holds NaN or inf"):
            call()
    assert torch.equal(tiny.logits(model, ids), before)


@pytest.mark.parametrize("rope", [True, False])
def test_gates_belong_to_one_model_at_a_time(tiny, rope):
    """Its RoPE, precision and device are theirs; a copy of the gates has its own."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model, other, ids = tiny.make(), tiny.make(rope_parameters=yarn), tiny.tokens(1, 100)
    other.load_state_dict(model.state_dict())
    gates = tiny.gates_for(model, rope=rope)
    host.attach(model, gates, "top_k:0.3", min_tokens=0)
    before = tiny.logits(model, ids)
    host.attach(other, tiny.gates_for(other, rope=rope), "top_k:0.3", min_tokens=0)

    def inside_dense():
        with host.dense(other):
            host.attach(other, gates, "top_k:0.3")

    for call in (
        lambda: host.attach(other, gates, "top_k:0.3"),
        lambda: host.add_gates(other, "more", gates),
        lambda: gates.use_rotary_of(other),
        inside_dense,
    ):
        with pytest.raises(ValueError, match=r"attached to another model.*copy.deepcopy\(gates\), or detach"):
            call()
        assert torch.equal(tiny.logits(model, ids), before)
    host.attach(other, copy.deepcopy(gates), "top_k:0.3", min_tokens=0)
    host.attach(copy.deepcopy(model), copy.deepcopy(gates), "top_k:0.3", min_tokens=0).bfloat16()
    host.attach(model, gates, "top_k:0.3", min_tokens=0)
    assert torch.equal(tiny.logits(model, ids), before)
    # They are free again once their model lets them go: by detach, by other gates, or by being gone.
    for leave in (host.detach, lambda one: host.attach(one, tiny.gates_for(one), "top_k:0.3")):
        leave(model)
        host.attach(other, gates, "top_k:0.3")
        host.detach(other)
        host.attach(model, gates, "top_k:0.3", min_tokens=0)
        assert torch.equal(tiny.logits(model, ids), before)
    del model
    gc.collect()
    host.attach(other, gates, "top_k:0.3")
