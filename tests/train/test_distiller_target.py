"""Which target gates learn: that of the run's settings."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seerattention.hosts.transformers import intercept
from seerattention.ops.dense_attention import dense_attention
from seerattention.ops.pooled_attention import pooled_map
from seerattention.train import DistillConfig, Distiller, TextWindows, target_recall
from seerattention.train.target import counted, decode_rows, decode_target


@pytest.mark.parametrize("pool", ["max", "mass"])
def test_objectives_get_the_target_that_is_asked_for(tiny, model, text, pool):
    tokens, gates, rows = text[:256], tiny.gates_of(model, phase="both"), decode_rows(256)
    config = DistillConfig(steps=1, target=pool)
    trainer = Distiller(model, gates, TextWindows(text, 256), config, heldout=[tokens], reach=256)
    objective, found, expected, recalls = trainer.objective, [], [], []

    def remember(target, *rest):
        found.append(target)
        return objective(target, *rest)

    trainer.objective = remember
    trainer.accumulate(tokens[None], 0.1)
    by_layer = dict(gates.items())

    def collect(call):
        target = pooled_map(call.q, call.k, (16, 16), scale=call.scale, pool=pool)
        scores = by_layer[call.layer](call.q_nope, call.k_nope)
        recalls.append(target_recall(target, scores, (16, 16), 256, 0.5))
        expected.append(counted(target, scores, (16, 16), 256)[0])
        expected.append(decode_target(call.q, call.k, rows, 16, scale=call.scale, pool=pool))
        return dense_attention(call.q, call.k, call.v, scale=call.scale)

    with torch.no_grad(), intercept(model, collect):
        model.get_decoder()(torch.from_numpy(tokens[None]), use_cache=False)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert trainer.heldout_recall((0.5,))["prefill"] == [pytest.approx(np.mean(recalls), rel=1e-4)]


def test_checkpoints_from_before_there_were_other_targets_go_on_with_the_largest_weight(
    tiny, model, text, tmp_path
):
    def start(**settings):
        config = DistillConfig(steps=2, save_every=1, **settings)
        return Distiller(model, tiny.gates_of(model), TextWindows(text, 128), config, out=tmp_path)

    next(start(target="max").run())
    assert json.loads((tmp_path / "run.json").read_text())["config"]["target"] == "max"
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    del state["config"]["target"]
    save_file(load_file(path), path, metadata={"state": json.dumps(state)})
    assert start(target="max").done == 1
    with pytest.raises(ValueError, match=r"another run, config\.target differ"):
        start()


def test_checkpoints_from_before_there_were_shares_go_on_with_products(tiny, model, text, tmp_path):
    def start(**gate):
        config = DistillConfig(steps=2, save_every=1)
        return Distiller(model, tiny.gates_of(model, **gate), TextWindows(text, 128), config, out=tmp_path)

    next(start(shares=False).run())
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    del state["gate"]["shares"]
    save_file(load_file(path), path, metadata={"state": json.dumps(state)})
    assert start(shares=False).done == 1
    with pytest.raises(ValueError, match=r"go on with gate\.shares false and the design in its config\.toml"):
        start()


def test_the_rate_is_that_of_the_phase():
    assert [DistillConfig().peak(phase) for phase in ("prefill", "both", "decode")] == [1e-3, 1e-3, 3e-3]
    assert DistillConfig(lr=0.1).peak("decode") == 0.1
    with pytest.raises(ValueError, match="a file that leaves them empty meant sharp_kl and max"):
        DistillConfig(objective="", target="")


@pytest.mark.parametrize("rows", [128, 4])
def test_both_is_the_mean_of_two_maps(tiny, model, text, monkeypatch, rows):
    from seerattention.train import distiller, target

    monkeypatch.setattr(target, "PREFILL_ROWS", rows)
    found, learn = {}, distiller.learn
    for name in ("mass", "max", "both"):
        gates = tiny.gates_of(model, phase="both")
        seen = found.setdefault(name, [])
        monkeypatch.setattr(
            distiller,
            "learn",
            lambda g, q, k, targets, *a, seen=seen, **b: (
                seen.append(targets) or learn(g, q, k, targets, *a, **b)
            ),
        )
        config = DistillConfig(steps=1, target=name)
        assert all(
            0 < step.recall <= 1 for step in Distiller(model, gates, TextWindows(text, 256), config).run()
        )
    for mass, largest, both in zip(found["mass"], found["max"], found["both"], strict=True):
        for phase in ("prefill", "decode"):
            assert torch.allclose(both[phase], (mass[phase] + largest[phase]) / 2, atol=1e-6)
            assert not torch.allclose(mass[phase], largest[phase], atol=1e-3)
