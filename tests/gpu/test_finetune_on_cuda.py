"""Joint training on a CUDA device: through the kernels as through the reference, resumed within the noise."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seerattention.hosts.transformers import new_gates
from seerattention.train import FinetuneConfig, Finetuner, TextWindows, prepare

pytestmark = pytest.mark.gpu

LENGTH = 2048


@pytest.fixture(scope="module")
def text():
    """Passages about one of 24 topics of four words each: a block's words tell whether it matters."""
    rng = np.random.default_rng(0)
    return 1 + np.concatenate([4 * rng.integers(0, 24) + rng.integers(0, 4, 96) for _ in range(300)])


def start(text, out=None, dtype=torch.bfloat16, backend="auto", **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config).to("cuda", dtype)
    gates = new_gates(model)
    config = FinetuneConfig(**{"steps": 8, "lr": 1e-3, "density": (0.2, 0.2), "save_every": 3, **settings})
    return Finetuner(prepare(model), gates, TextWindows(text, LENGTH, 2), config, out=out, backend=backend)


def gradients(tuner):
    tuner.accumulate(tuner.batches(0), 0.2)
    return {n: p.grad for n, p in tuner.named.items()}


def test_gradients_through_the_kernels_are_those_through_the_reference(text):
    fast = gradients(start(text))
    plain = gradients(start(text, backend="reference"))
    gold = gradients(start(text, dtype=torch.float32, backend="reference"))
    for name, exact in gold.items():
        error, allowed = (float((g[name] - exact).abs().max()) for g in (fast, plain))
        band = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
        assert error <= 2 * allowed + band, name


def test_a_stopped_run_ends_like_another_one_that_was_not(text, tmp_path):
    straight = np.array([[s.loss for s in start(text).run()] for _ in range(6)])
    for step in start(text, tmp_path).run():
        if step.step == 5:
            break
    resumed = start(text, tmp_path)
    assert resumed.done == 3
    losses = [s.loss for s in resumed.run()]
    # How far any run is from the mean of the others; resumed, from the mean of all.
    others = (straight.sum(0) - straight) / (len(straight) - 1)
    noise = np.abs(straight - others)[:, 3:].max()
    moved = np.abs(losses - straight.mean(0)[3:]).max()
    print(f"run-to-run noise of the loss {noise:.2e}, resumed {moved:.2e}")
    # The largest of few is a small sample of the noise, so a rounding of the loss comes on top.
    assert moved <= 2 * noise + torch.finfo(torch.bfloat16).eps * 0.01 * straight[0, -1]


def test_joint_training_learns(text):
    losses = [s.loss for s in start(text, steps=100, lr=3e-3).run()]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
