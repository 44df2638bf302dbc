"""A tiny model to distil gates for, and text for it."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # Attention of small random weights is uniform; there would be nothing to learn.
        for name, parameter in built.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if "q_proj" in name or "k_proj" in name else 4)
    return built


@pytest.fixture
def text():
    """Passages about one of 24 topics of four words each: a block's words tell whether it matters."""
    rng = np.random.default_rng(0)
    return 1 + np.concatenate([4 * rng.integers(0, 24) + rng.integers(0, 4, 48) for _ in range(84)])
