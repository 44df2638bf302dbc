"""Tiny random models of every family, and the error budget that attached models are held to."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from seerattention import models

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
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen3-yarn": (Qwen3ForCausalLM, Qwen3Config, {"rope_parameters": YARN, "head_dim": 16}),
    "qwen2-mixed": (Qwen2ForCausalLM, Qwen2Config, MIXED),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 24}),
}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
ATTACHABLE = [kind for kind in KINDS if kind != "mistral-sliding"]


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
    # Random text never ends by itself.
    model.generation_config.eos_token_id = None
    return model


def tokens(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def gates_for(model, **settings):
    torch.manual_seed(7)
    return models.new_gates(model, **{"block_size": BLOCK, **settings})


def attach_full(model):
    """Attach gates that select everything."""
    return models.attach(model, gates_for(model), "top_k:1.0", min_tokens=0)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@torch.no_grad()
def gold_logits(model, ids, **kwargs):
    """The same model in fp64."""
    return copy.deepcopy(model).double()(ids, **kwargs).logits


def assert_as_close(actual, expected, gold):
    """``actual`` errs at most twice as much as ``expected`` against fp64, plus a few roundings."""
    band = 4 * torch.finfo(expected.dtype).eps * gold.abs().max()
    budget = 2 * (expected.double() - gold).abs().max() + band
    error = (actual.double() - gold).abs().max()
    assert error <= budget, f"error {error:.3g} is over the budget {budget:.3g}"
    assert actual.dtype == expected.dtype


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
        block=BLOCK,
        vocab=VOCAB,
        shape=SHAPE,
    )


def pytest_generate_tests(metafunc):
    for argument, values in (("family", FAMILIES), ("kind", ATTACHABLE)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, values)
