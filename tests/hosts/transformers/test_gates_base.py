"""What identifies a base model, how gates rotate, and how a family is added."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import bitnet

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers import base
from seerattention.hosts.transformers.base import device_of
from seerattention.hosts.transformers.family import attention_layers


def loaded(model, folder, dtype):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype)


def projection(model, layer):
    attention = model.model.layers[layer].self_attn
    return attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.k_proj


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_fingerprint_does_not_depend_on_the_loaded_dtype(tiny, family, tmp_path, stored, dtype):
    model = tiny.make(family)
    with torch.no_grad():
        # Values that float16 holds with fewer bits than bfloat16, or not at all.
        projection(model, 0).weight[:8] *= 1e-4
        projection(model, 1).weight[-8:] *= 1e-7
    model.to(stored)
    expected = host.BaseInfo.of(model).fingerprint
    assert host.BaseInfo.of(loaded(model, tmp_path, dtype)).fingerprint == expected


def test_fingerprint_of_a_float32_model_loaded_in_bfloat16(tiny, family, tmp_path):
    model = tiny.make(family)
    other = loaded(model, tmp_path, torch.bfloat16)
    assert host.BaseInfo.of(other).fingerprint == host.BaseInfo.of(model).fingerprint
    host.attach(other, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    assert tiny.logits(other, tiny.tokens(1, 40)).dtype == torch.bfloat16


def test_fingerprint_tells_models_apart(tiny, family):
    model = tiny.make(family)
    own = host.BaseInfo.of(model).fingerprint
    assert host.BaseInfo.of(tiny.make(family)).fingerprint == own
    assert host.BaseInfo.of(tiny.make(family, seed=1)).fingerprint != own
    for part in (lambda model: projection(model, 0), lambda model: model.model.layers[1].self_attn.o_proj):
        tuned = tiny.make(family)
        with torch.no_grad():
            part(tuned).weight.mul_(1.02)
        assert host.BaseInfo.of(tuned).fingerprint != own


def test_fingerprint_ignores_gates_and_the_mlp(tiny):
    model = tiny.make()
    own = host.BaseInfo.of(model)
    host.attach(model, tiny.gates_for(model), "top_k:0.1")
    assert host.BaseInfo.of(model) == own
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert host.BaseInfo.of(model) == own


@pytest.mark.parametrize("size", [1, 5, 256, 257, 2**24 + 2, 8192 * 8192, 2**40 + 1])
def test_sampled_positions_stay_inside(size):
    picks = base._spread(size, 256)
    assert len(picks) == min(size, 256)
    assert picks[0] == 0
    assert picks[-1] == size - 1
    assert (picks.diff() > 0).all()


def test_checksum_covers_every_weight(tiny):
    model = tiny.make()
    own = host.base_checksum(model)
    assert host.base_checksum(tiny.make()) == own
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            was = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] += 1
            assert host.base_checksum(model) != own, name
            parameter.view(-1)[-1] = was
    assert host.base_checksum(model) == own
    host.attach(model, tiny.gates_for(model), "top_k:0.1")
    assert host.base_checksum(model) == own


class Packed(nn.Module):
    """Weights of eight bits in buffers, as layers of GPTQ, AWQ and BitNet hold theirs."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("workspace", torch.zeros(2), persistent=False)

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales)


def bit_linear(linear):
    made = bitnet.BitLinear(linear.in_features, linear.out_features, bias=False, dtype=torch.float32)
    scale = linear.weight.detach().abs().mean()
    made.weight = bitnet.pack_weights((linear.weight.detach() / scale).round().clamp(-1, 1))
    made.weight_scale = (1 / scale)[None]
    return made


def quantised(model, make):
    for attention in attention_layers(model).values():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, make(getattr(attention, name)))
    return model


def named(model, name):
    model.config._name_or_path = name
    return model


# Norms stay parameters in qwen3, and identify nothing.
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@pytest.mark.parametrize("make", [Packed, bit_linear])
def test_models_whose_quantised_weights_are_buffers_are_known_by_name(tiny, make, shape):
    full = named(tiny.make(shape), "someone/base")
    small = named(quantised(tiny.make(shape), make), "me/base")
    other = named(quantised(tiny.make(shape, seed=5), make), "someone/other")
    assert host.BaseInfo.of(small).fingerprint == ""
    for gates in (tiny.gates_for(full), tiny.gates_for(small)):
        host.attach(small, gates, "top_k:0.8", min_tokens=0)
        with pytest.raises(ValueError, match="its name is other, not base, and nothing but the name"):
            host.attach(other, gates, "top_k:0.8")


def test_weights_that_are_not_saved_leave_nothing_to_identify(tiny):
    """Norms alone would be the same in many models."""
    model = tiny.make("qwen3")
    for attention in attention_layers(model).values():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, nn.Identity())
    assert host.BaseInfo.of(model).fingerprint == ""


def test_weights_in_buffers_are_found(tiny):
    """Frozen by being no parameters: the same numbers are the same model."""
    model, frozen = tiny.make(), tiny.make()
    for module in list(frozen.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
    assert host.BaseInfo.of(frozen) == host.BaseInfo.of(model)
    assert host.base_checksum(frozen) == host.base_checksum(model)
    # Where they are is where gates go.
    frozen.to("meta").model.layers[0].self_attn.q_proj._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert device_of(frozen.model.layers[0]) == torch.device("cuda:1")


def test_checksum_covers_buffers_that_are_saved(tiny):
    model = quantised(tiny.make(), Packed)
    own = host.base_checksum(model)
    for name, buffer in model.named_buffers():
        was = buffer.flatten()[-1].clone()
        buffer.view(-1)[-1] += 1
        assert (host.base_checksum(model) != own) == name.endswith(("qweight", "scales")), name
        buffer.view(-1)[-1] = was
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    assert tiny.logits(model, tiny.tokens(1, 70)).isfinite().all()
    assert host.base_checksum(model) == own


def test_new_gates_fit_the_model(tiny, kind):
    model = tiny.make(kind)
    gates = host.new_gates(model, block_size=32, gate_dim=8)
    config = model.config
    assert (gates.config.num_heads, gates.config.num_kv_heads) == (4, 2)
    assert gates.config.head_dim == model.model.layers[0].self_attn.head_dim
    assert (gates.config.block_size, gates.config.dim) == (32, 8)
    assert gates.base.model_type == config.model_type
    assert gates.policy is None
    assert all(p.dtype == torch.float32 for p in gates.parameters())
    with pytest.raises(ValueError, match="unknown gate settings"):
        host.new_gates(model, colour="red")
    with pytest.raises(dataclasses.FrozenInstanceError):
        gates.config.block_size = 1


def test_gates_rotate_like_the_model(tiny, kind):
    model = tiny.make(kind)
    gate = dict(tiny.gates_for(model, gate_dim=model.model.layers[0].self_attn.head_dim).items())[0]
    positions = torch.tensor([0, 16, 48, 400])
    x = torch.randn(2, 4, 4, gate.config.dim)
    expected = tiny.rotated(model, 0, x, positions[None])
    order = tiny.order(model)
    assert torch.equal(gate.rotate(x[..., order], positions), expected[..., order])


def test_scaled_rope_is_not_plain_rope(tiny):
    x, positions = torch.randn(1, 4, 3, 16), torch.tensor([16, 48, 400])
    plain = dict(tiny.gates_for(tiny.make("llama")).items())[0].rotate(x, positions)
    for kind in ("llama-llama3", "qwen3-yarn"):
        assert not torch.allclose(
            dict(tiny.gates_for(tiny.make(kind)).items())[0].rotate(x, positions), plain
        )


@pytest.mark.parametrize("rope", ["llama", "llama-llama3", "qwen3-yarn"])
def test_spread_pairs_rotate_as_a_model_of_that_head_dim(tiny, rope):
    model, narrow = tiny.make(rope), tiny.make(rope, head_dim=8)
    gate = dict(tiny.gates_for(model, gate_dim=8, rope_pairs="spread").items())[0]
    positions = torch.tensor([0, 16, 400])
    x = torch.randn(1, 4, 3, 8)
    cos, sin = narrow.model.rotary_emb(x, positions[None])
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
    assert torch.equal(gate.rotate(x, positions), x * cos[:, None] + turned * sin[:, None])


@pytest.mark.parametrize("rope", ["llama", "llama-llama3", "qwen3-yarn", "phi3-longrope", "glm4"])
def test_slowest_pairs_rotate_as_they_do_in_the_head(tiny, rope):
    model = tiny.make(rope)
    whole, narrow = (dict(tiny.gates_for(model, gate_dim=dim).items())[0] for dim in (None, 8))
    dim = whole.config.dim
    kept = torch.arange(dim // 2 - 4, dim // 2)
    kept = torch.cat((kept, kept + dim // 2))
    positions = torch.tensor([0, 16, 400])
    x = torch.randn(1, 4, 3, dim)
    assert torch.equal(narrow.rotate(x[..., kept], positions), whole.rotate(x, positions)[..., kept])
    # The projection starts by passing the mean of just those values.
    passed = narrow.linear_k.weight[0, -dim:].round()
    assert torch.equal(passed, torch.eye(dim)[:, kept])
    if rope != "phi3-longrope":
        host.attach(model, tiny.gates_for(model, gate_dim=8), "top_k:0.8", min_tokens=0)
        assert tiny.logits(model, tiny.tokens(1, 70)).isfinite().all()


class CousinConfig(LlamaConfig):
    model_type = "cousin"


class CousinForCausalLM(LlamaForCausalLM):
    config_class = CousinConfig


def test_a_family_is_one_file(tiny, tmp_path, monkeypatch):
    families = sys.modules["seerattention.hosts.transformers.families"]
    model, ids = CousinForCausalLM(CousinConfig(**tiny.shape)).eval(), tiny.tokens(2, 70)
    with pytest.raises(NotImplementedError, match=r"'cousin' has no family file.*write families/cousin.py"):
        host.new_gates(model)
    (tmp_path / "cousin.py").write_text(
        '"""cousin: as in llama."""\n\n\n'
        "def taps(attention):\n"
        "    return attention.q_proj, attention.k_proj\n"
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert "cousin" in host.families()
    dense, gold = tiny.logits(model, ids), tiny.gold_logits(model, ids)
    gates = tiny.gates_for(model)
    assert gates.base.model_type == "cousin"
    host.attach(model, gates, "top_k:1", min_tokens=0)
    tiny.assert_as_close(tiny.logits(model, ids), dense, gold)
    host.set_policy(model, "top_k:0.1")
    assert not torch.equal(tiny.logits(model, ids), dense)
    host.detach(model)
    assert torch.equal(tiny.logits(model, ids), dense)


def test_a_family_file_that_does_not_fit_leaves_the_model_alone(tiny, tmp_path, monkeypatch):
    families = sys.modules["seerattention.hosts.transformers.families"]

    class OddConfig(LlamaConfig):
        model_type = "odd"

    model, ids = LlamaForCausalLM(OddConfig(**tiny.shape)).eval(), tiny.tokens(1, 20)
    (tmp_path / "odd.py").write_text("def taps(attention):\n    return attention.q_norm, attention.k_norm\n")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    dense = tiny.logits(model, ids)
    with pytest.raises(AttributeError, match="q_norm"):
        host.attach(model, tiny.gates_for(model), "top_k:0.5")
    assert not host.attached(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(tiny.logits(model, ids), dense)
