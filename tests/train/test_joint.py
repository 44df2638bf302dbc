"""The joint objective: where its gradients go, and what layers read."""

import numpy as np
import pytest
import torch

from seerattention.hosts.transformers import attach, detach
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.policies import select
from seerattention.rows import Rows
from seerattention.train import (
    DistillConfig,
    Distiller,
    FinetuneConfig,
    Finetuner,
    Packed,
    TextWindows,
    checkpoint_layers,
    prepare,
)
from seerattention.train.joint import policy_of
from seerattention.train.soft import log_gates, soft_attention

#: Four of the 8 blocks of a window, two besides the first and the own one.
DENSITY = 0.8


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def accumulated(model, gates, batch, **settings):
    """Gradients of model and gates after one pass, and its loss, gate loss and recall."""
    config = FinetuneConfig(**{"steps": 1, "density": (DENSITY, DENSITY), **settings})
    model.zero_grad(set_to_none=True)
    gates.zero_grad(set_to_none=True)
    tuner = Finetuner(model, gates, lambda step: batch, config)
    values = tuner.accumulate(batch, config.densities[0])
    return gradients(model), gradients(gates), values


@pytest.fixture(scope="module")
def batch(text):
    return TextWindows(text, 128, 2)(0)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b):
    """Equal to the rounding of sums in another order."""
    assert a.keys() == b.keys()
    for name in a:
        eps = 512 * torch.finfo(torch.float32).eps
        assert float((a[name] - b[name]).abs().max()) <= eps * float(b[name].abs().max()), name


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_gates_loss_does_not_move_the_model_nor_the_language_loss_the_gates(tiny, kind, batch):
    model = prepare(tiny.make(kind))
    gates = tiny.gates_of(model)
    both, of_gates, _ = accumulated(model, gates, batch)
    alone, nothing, _ = accumulated(model, gates, batch, gate_weight=0.0)
    assert same(both, alone)
    assert not nothing
    assert len(both) == len(list(model.parameters()))
    assert all(bool(g.any()) for g in of_gates.values())


@pytest.mark.parametrize("target", ["max", "mass"])
def test_the_gates_gradient_is_that_of_distillation_times_the_weight(tiny, model, batch, target):
    gates = tiny.gates_of(model)
    config = DistillConfig(steps=1, target=target)
    Distiller(model, gates, lambda step: batch, config, reach=batch.shape[1]).accumulate(batch, 0.1)
    distilled = gradients(gates)
    _, joint, values = accumulated(prepare(model), gates, batch, density=(1.0, 1.0), target=target)
    close(joint, {name: 10 * g for name, g in distilled.items()})
    assert float(values[2]) == pytest.approx(1, abs=1e-6)


def test_the_language_gradient_is_that_of_the_attached_model(tiny, model, batch):
    """Training reads the blocks that prefill with the same policy reads."""
    gates = tiny.gates_of(model)
    mine, _, values = accumulated(prepare(model), gates, batch)
    model.zero_grad(set_to_none=True)
    tokens = torch.from_numpy(batch)
    attach(model, gates, policy_of(DENSITY), min_tokens=0, backend="reference")
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    detach(model)
    close(mine, gradients(model))
    assert float(values[0]) == pytest.approx(loss.item(), rel=1e-6)


def test_gradient_checkpointing_changes_nothing_and_gates_learn_once(tiny, model, batch):
    gates = tiny.gates_of(model)
    plain = accumulated(prepare(model), gates, batch)
    checkpoint_layers(model)
    model.train()
    again = accumulated(model, gates, batch)
    assert same(plain[0], again[0])
    assert same(plain[1], again[1])
    assert torch.equal(plain[2], again[2])


def test_documents_of_a_pack_are_predicted_as_each_would_be_alone(tiny, model, text):
    lengths = (150, 40, 66)
    tokens = text[:256][None].astype(np.int64)
    gates = tiny.gates_of(model)
    prepare(model)
    packed = accumulated(model, gates, Packed(tokens, (lengths,)))
    first = accumulated(model, gates, tokens[:, :150])
    last = accumulated(model, gates, tokens[:, 190:])
    for i, share in ((0, 149 / 214), (1, 150 / 216)):
        close(packed[i], {n: share * first[i][n] + (1 - share) * last[i][n] for n in first[i]})
    shares = torch.tensor([149 / 214, 150 / 216, 150 / 216])
    assert packed[2].tolist() == pytest.approx(
        (shares * first[2] + (1 - shares) * last[2]).tolist(), rel=1e-5
    )


def test_soft_gates_bring_the_language_loss_to_the_gates_and_not_to_their_inputs(tiny, model, batch):
    gates = tiny.gates_of(model)
    prepare(model)
    weighted = accumulated(model, gates, batch, soft_gates=True)
    language = accumulated(model, gates, batch, soft_gates=True, gate_weight=0.0)
    assert same(weighted[0], language[0])
    assert all(bool(g.any()) for g in language[1].values())
    hard = accumulated(model, gates, batch)[1]
    # Later layers read what soft attention made of the first.
    first = {n for n in hard if n.startswith("layers.0.")}
    close({n: weighted[1][n] for n in first}, {n: hard[n] + language[1][n] for n in first})


def test_the_first_and_the_own_block_are_read_however_bad_their_scores():
    scores = torch.arange(8.0).sub(3.5).square().neg().expand(1, 1, 8, 8)
    selection = select(policy_of(0.1), scores, rows=Rows.last(128, 128), block_size=(16, 16))
    mask = selection.to_mask()[0, 0]
    assert bool(mask[:, 0].all())
    assert bool(mask.diagonal().all())
    assert not bool(mask[7, 1:3].any())


def test_soft_gates_close_to_hard_ones_give_hard_attention_and_have_the_right_gradient():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 64, 8, dtype=torch.float64) for h in (4, 2, 2))
    scores = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    selection = select(policy_of(0.95), scores, rows=Rows.last(64, 64), block_size=(16, 16))
    # Three of at most four blocks, one of them free.
    assert int(selection.counts.sum()) == 4 * (1 + 2 + 3 + 3)
    hard = block_sparse_attention(q, k, v, selection, scale=0.3, backend="reference")

    def attend(scores, temperature=1.0):
        bias = log_gates(scores, selection, policy_of(0.95), 64, temperature)
        return soft_attention(q, k, v, selection, bias, scale=0.3)

    assert torch.allclose(attend(scores, 1e-4), hard, rtol=0, atol=1e-12)
    assert not torch.allclose(attend(scores), hard, atol=1e-3)
    # The limit is between two scores and gets no gradient, so it stays fixed here too.
    leaf = scores.clone().requires_grad_()
    limit_free = torch.autograd.functional.jacobian(lambda s: attend(s).sum(), leaf)
    assert bool(limit_free.any())
    read = selection.to_mask()
    always = policy_of(0.95).always(torch.eye(4, dtype=torch.bool), torch.ones(4, 4).tril().bool())
    assert not bool(limit_free[~read].any())
    assert not bool(limit_free[(read & always).expand_as(limit_free)].any())
