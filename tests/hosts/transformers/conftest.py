"""Tiny random models of every family, and the error budget that attached models are held to."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.masking_utils import sdpa_mask

from seerattention.hosts import transformers as host

VOCAB = 97
BLOCK = 16
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MIXED = {
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 24,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
ALTERNATING = {name: value for name, value in MIXED.items() if name != "use_sliding_window"}
BY_LAYER_TYPE = {
    "full_attention": {**YARN, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
# All experts take part: a rounding that picks another expert would hide what attention computes.
EXPERTS = {"num_experts_per_tok": 4, "num_local_experts": 4}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen3-yarn": (Qwen3ForCausalLM, Qwen3Config, {"rope_parameters": YARN, "head_dim": 16}),
    "qwen2-mixed": (Qwen2ForCausalLM, Qwen2Config, MIXED),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"head_dim": 32, "num_experts_per_tok": 4, "num_experts": 4, "moe_intermediate_size": 32},
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "olmo3": (Olmo3ForCausalLM, Olmo3Config, {**ALTERNATING, "rope_parameters": BY_LAYER_TYPE}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"attention_multiplier": 0.4, "logits_scaling": 2.0}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layers": [1, 0]}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"rope_parameters": PARTIAL}),
    "phi3-longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        # Phi3's configuration takes the switch from here alone.
        {"rope_parameters": LONG, "original_max_position_embeddings": 64},
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config, {"head_dim": 16, "rope_parameters": PARTIAL}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {**ALTERNATING, "head_dim": 32, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0},
    ),
    "gemma3_text": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {**ALTERNATING, "head_dim": 32, "query_pre_attn_scalar": 20, "rope_parameters": BY_LAYER_TYPE},
    ),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {**ALTERNATING, **EXPERTS, "head_dim": 16}),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 24}),
}
# Those whose layers all have full attention.
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "olmo2", "smollm3", "phi3", "glm4"]
ATTACHABLE = [kind for kind in KINDS if kind not in ("mistral-sliding", "phi3-longrope")]


def make(kind="llama", *, seed=0, **changes):
    """A tiny model with weights large enough that attention is far from uniform."""
    model_class, config_class, settings = KINDS[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**copy.deepcopy({**SHAPE, **settings, **changes}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if model.config.model_type in ("qwen3_moe", "gpt_oss"):
        # The other implementations have no fp64.
        model.set_experts_implementation("eager")
    if model.config.model_type == "gemma2":
        # Some versions of transformers take sdpa by default, which leaves the soft-cap out.
        model.set_attn_implementation("eager")
    # Random text never ends by itself.
    model.generation_config.eos_token_id = None
    return model


def tokens(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def gates_for(model, **settings):
    torch.manual_seed(7)
    return host.new_gates(model, **{"block_size": BLOCK, **settings})


def attach_full(model):
    """Attach gates that select everything."""
    return host.attach(model, gates_for(model), "top_k:1.0", min_tokens=0)


@torch.no_grad()
def logits(model, ids, cache=None, **kwargs):
    if cache is not None:
        kwargs |= host.cache_argument(model, cache)
    return model(ids, **kwargs).logits


def gold_attention(module, query, key, value, mask, scaling, softcap=None, s_aux=None, **_):
    """Attention in the dtype of its inputs; transformers' eager one takes the softmax in fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + s_aux.exp()[:, None, None]
    # Padding tokens see nothing.
    return (weights / total.clamp_min(1e-300) @ value).transpose(1, 2), None


def gold_mask(*args, **kwargs):
    """A mask of booleans, also where other implementations do without."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


@torch.no_grad()
def gold_logits(model, ids, **kwargs):
    """The same model in fp64."""
    gold = copy.deepcopy(model).double()
    if gold.config._attn_implementation == "eager":
        AttentionInterface.register("gold", gold_attention)
        AttentionMaskInterface.register("gold", gold_mask)
        gold.set_attn_implementation("gold")
    return gold(ids, **kwargs).logits


def assert_as_close(actual, expected, gold):
    """``actual`` errs at most twice as much as ``expected`` against fp64, plus a few roundings."""
    band = 4 * torch.finfo(expected.dtype).eps * gold.abs().max()
    budget = 2 * (expected.double() - gold).abs().max() + band
    error = (actual.double() - gold).abs().max()
    assert error <= budget, f"error {error:.3g} is over the budget {budget:.3g}"
    assert actual.dtype == expected.dtype


def full_layers(model):
    """The layers with full attention."""
    return [0, 2] if model.config.num_hidden_layers == 3 else [0, 1]


def rotated(model, layer, x, positions):
    """Rotate ``[B, H, T, D]`` by the model's own code as this layer does."""
    config = model.config
    if config.model_type == "smollm3" and not config.no_rope_layers[layer]:
        return x
    kinds = (config.layer_types[layer],) if config.model_type in ("olmo3", "gemma3_text") else ()
    cos, sin = model.model.rotary_emb(x, positions, *kinds)
    return sys.modules[type(model).__module__].apply_rotary_pos_emb(x, x, cos, sin)[0]


def order(model):
    """The order of a head's values in which gates see q and k, written down by hand."""
    size = model.model.layers[0].self_attn.head_dim
    if model.config.model_type == "phi3" and model.config.rope_parameters["rope_type"] == "longrope":
        return [*range(6), 12, 13, *range(6, 12), 14, 15]
    return {
        "phi3": [*range(4), *range(8, 12), *range(4, 8), *range(12, 16)],
        "glm4": [0, 2, 4, 6, 8, 9, 10, 11, 1, 3, 5, 7, 12, 13, 14, 15],
    }.get(model.config.model_type, list(range(size)))


@pytest.fixture(autouse=True)
def _one_thread():
    # Threads cost these tiny products ten times what they save.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    """The helpers above."""
    return SimpleNamespace(
        make=make,
        tokens=tokens,
        gates_for=gates_for,
        attach_full=attach_full,
        logits=logits,
        gold_logits=gold_logits,
        assert_as_close=assert_as_close,
        full_layers=full_layers,
        rotated=rotated,
        order=order,
        block=BLOCK,
        vocab=VOCAB,
        shape=SHAPE,
    )


def pytest_generate_tests(metafunc):
    for argument, values in (("family", FAMILIES), ("kind", ATTACHABLE)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, values)
