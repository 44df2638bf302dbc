"""Attaching, generating and distilling on a CUDA device."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seerattention.distill import DistillConfig, Distiller, TextWindows
from seerattention.models import attach, detach, new_gates, usage
from seerattention.testing.budget import Budget

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).to("cuda").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_selection_equals_dense(model, dtype):
    tokens = torch.randint(0, 128, (2, 700), generator=torch.Generator().manual_seed(1)).cuda()
    model = model.to(dtype)
    with torch.inference_mode():
        dense = model(tokens).logits
        gold = model.double()(tokens).logits
        model.to(dtype)
        band = torch.finfo(dtype).eps * float(gold.abs().max())
        budget = Budget(gold, dtype, 2 * float((dense.double() - gold).abs().max()) + band)
        attach(model, new_gates(model), "top_k:1.0", min_tokens=0)
        sparse = model(tokens).logits
        assert usage(model) == {"sparse": 2}
        detach(model)
        again = model(tokens).logits
    model.float()
    budget.check(sparse)
    assert torch.equal(again, dense)


def test_sparse_generation_runs(model):
    tokens = torch.randint(0, 128, (1, 1000), generator=torch.Generator().manual_seed(2)).cuda()
    attach(model, new_gates(model), "top_k:0.2", min_tokens=0)
    try:
        written = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    finally:
        detach(model)
    assert written.shape == (1, 1008)


def test_distillation_lowers_the_loss(model):
    rng = np.random.default_rng(0)
    batches = TextWindows(rng.integers(0, 128, 20000), 1024, seed=3)
    torch.manual_seed(0)
    gates = new_gates(model, init="random")
    steps = list(Distiller(model, gates, batches, DistillConfig(steps=40, lr=3e-3)).run())
    assert np.mean([s.loss for s in steps[-5:]]) < np.mean([s.loss for s in steps[:5]])
