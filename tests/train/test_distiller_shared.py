"""Gates that serve several layers learn from the map of each."""

import numpy as np
import pytest
import torch

from seerattention.hosts.transformers import intercept
from seerattention.ops.dense_attention import dense_attention
from seerattention.ops.pooled_attention import pooled_map
from seerattention.train import DistillConfig, Distiller, Finetuner, TextWindows, target_recall
from seerattention.train.target import counted


def test_every_layer_teaches_the_gate_whose_choice_it_reads(tiny, text):
    model = tiny.make(max_position_embeddings=512, num_hidden_layers=3)
    tokens, gates = text[:256], tiny.gates_of(model, layers_per_gate=2)
    trainer = Distiller(
        model, gates, TextWindows(text, 256), DistillConfig(steps=1), heldout=[tokens], reach=256
    )
    objective, found = trainer.objective, []

    def remember(target, scores, *rest):
        found.append((target, scores.detach()))
        return objective(target, scores, *rest)

    trainer.objective = remember
    loss, recall = trainer.accumulate(tokens[None], 0.5).tolist()
    by_layer, first, expected, losses, recalls = dict(gates.items()), {}, [], [], []

    def collect(call):
        chooser = {0: 0, 1: 0, 2: 2}[call.layer]
        if chooser == call.layer:
            first[chooser] = call.q_nope, call.k_nope
        target = pooled_map(call.q, call.k, (16, 16), scale=call.scale, pool="mass")
        with torch.enable_grad():
            scores = by_layer[chooser](*first[chooser])
            rows = counted(target, scores, (16, 16), 256)
            losses.append(objective(*rows))
        expected.append(rows[:2])
        recalls.append(target_recall(target, scores.detach(), (16, 16), 256, 0.5))
        return dense_attention(call.q, call.k, call.v, scale=call.scale)

    with torch.no_grad(), intercept(model, collect):
        model.get_decoder()(torch.from_numpy(tokens[None]), use_cache=False)
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[0], other[0])
        torch.testing.assert_close(one[1], other[1].detach())
    assert loss == pytest.approx(float(sum(losses).detach()) / 3, rel=1e-5)
    assert recall == pytest.approx(np.mean(recalls), rel=1e-4)
    assert trainer.heldout_recall((0.5,))["prefill"] == [pytest.approx(np.mean(recalls), rel=1e-4)]
    gradients = torch.autograd.grad(sum(losses), list(gates.parameters()))
    for parameter, gradient in zip(gates.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_killed_run_goes_on(tiny, text, tmp_path):
    def start(out):
        model = tiny.make(max_position_embeddings=512, num_hidden_layers=4)
        gates = tiny.gates_of(model, layers_per_gate=2)
        config = DistillConfig(steps=4, save_every=2)
        return Distiller(model, gates, TextWindows(text, 128), config, out=out)

    whole, part = start(tmp_path / "whole"), start(tmp_path / "part")
    list(whole.run())
    for step in part.run():
        if step.step == 2:
            break
    again = start(tmp_path / "part")
    assert [step.step for step in again.run()] == [3, 4]
    for name, value in whole.gates.state_dict().items():
        assert torch.equal(again.gates.state_dict()[name], value)


def test_a_model_is_trained_with_a_gate_for_every_layer(tiny, model, text):
    gates = tiny.gates_of(model, layers_per_gate=2)
    with pytest.raises(ValueError, match="serve several layers each, and a model is trained with a gate for"):
        Finetuner(model, gates, TextWindows(text, 128))


def test_gates_of_other_layers_are_refused_before_anything_is_read(tiny, model, text):
    gates = tiny.gates_of(model)
    del gates.layers["0"]
    with pytest.raises(
        ValueError, match=r"these gates are for layers \[1\]; the model's full-attention layers"
    ):
        Distiller(model, gates, TextWindows(text, 128), DistillConfig(steps=1))
