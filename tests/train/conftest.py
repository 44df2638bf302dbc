"""Tiny models to teach gates for, or to train jointly with them, and text for them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from seerattention.hosts.transformers import new_gates

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def make(kind="llama", **settings):
    """Return a tiny model whose attention is not uniform: there would be nothing to learn."""
    torch.manual_seed(0)
    if kind == "llama":
        built = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings}))
    else:
        built = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "head_dim": 16, **settings}))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if "q_proj" in name or "k_proj" in name else 4)
    return built.eval()


def gates_of(model, **settings):
    torch.manual_seed(1)
    return new_gates(model, **{"block_size": 16, "q_sub_block": 8, "k_sub_block": 8, **settings})


@pytest.fixture(scope="session")
def tiny():
    """Makers of models and gates, and the shape of the models."""
    return SimpleNamespace(make=make, gates_of=gates_of, shape=SHAPE)


@pytest.fixture
def model():
    return make(max_position_embeddings=512)


@pytest.fixture(scope="session")
def text():
    """Passages about one of 24 topics of four words each: a block's words tell whether it matters."""
    rng = np.random.default_rng(0)
    return 1 + np.concatenate([4 * rng.integers(0, 24) + rng.integers(0, 4, 48) for _ in range(84)])
