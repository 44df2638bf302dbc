"""Calibrated gates on disk and on a model."""

import json

import pytest
import torch
from transformers import DynamicCache

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.checkpoint import CALIBRATION, CONFIG, WEIGHTS
from seerattention.policies import Calibrated, Calibration, TopK


def calibration(laws=None, **changes):
    nothing, everything = (0.0, 0.0, 0.0), (-30.0, 0.0, 0.0)
    laws = laws or {0: (everything,) * 4, 1: (nothing, everything) * 2}
    settings = {"target": "recall", "value": 0.9, "tokens": 256, "block_size": (16, 16), "row_exponent": 0.0}
    return Calibration(**{**settings, "density": None, "laws": laws, **changes})


@pytest.fixture
def saved(tiny, tmp_path):
    """A tiny model, and the folder of its calibrated gates."""
    model = tiny.make()
    folder = tmp_path / "gates"
    host.save_gates(tiny.gates_for(model), folder, policy="top_k:0.5")
    host.save_calibration(folder, Calibrated(calibration(), sink_blocks=1))
    return model, folder


def test_attach_uses_the_calibration_by_default_head_by_head(tiny, saved):
    model, folder = saved
    gates = host.load_gates(folder)
    assert gates.policy == "calibrated,sink_blocks=1"
    seen = {}
    host.attach(model, gates, min_tokens=0, observe=lambda layer, call, s: seen.update({layer: s}))
    tiny.logits(model, tiny.tokens(1, 128))
    assert (seen[0].counts == torch.arange(1, 9)).all()
    few = torch.arange(1, 9).clamp(max=2)
    assert seen[1].counts[0].tolist() == [few.tolist(), list(range(1, 9))] * 2


def test_pieces_select_what_the_whole_prompt_does(tiny, saved):
    model, folder = saved
    law = ((-1.2, -0.4, 0.3), (-2.0, 0.2, 0.1), (-1.0, -0.5, 0.2), (-3.0, 0.3, 0.3))
    made = calibration({0: law, 1: law}, target="density", value=0.6, density=0.6)
    host.save_calibration(folder, Calibrated(made, sink_blocks=1, dense_last_rows=1))
    rows = {}
    host.attach(
        model,
        host.load_gates(folder),
        min_tokens=0,
        observe=lambda layer, call, s: rows.setdefault(layer, []).append(s.to_mask()),
    )
    ids = tiny.tokens(1, 160)
    tiny.logits(model, ids)
    whole = {layer: masks.pop() for layer, masks in rows.items()}
    host.prefill(model, ids, DynamicCache(config=model.config), piece_tokens=64)
    for layer, masks in rows.items():
        assert len(masks) == 3
        assert not whole[layer].equal(torch.ones(10, 10, dtype=torch.bool).tril().expand(1, 4, 10, 10))
        first = 0
        for mask in masks:
            assert mask.equal(whole[layer][:, :, first : first + mask.shape[2], : mask.shape[3]])
            first += mask.shape[2]


def test_saving_calibrated_leaves_weights_and_other_files(tiny, saved):
    _, folder = saved
    (folder / "README.md").write_text("mine")
    weights = (folder / WEIGHTS).read_bytes()
    host.save_calibration(folder, Calibrated(calibration(value=0.8)))
    assert (folder / WEIGHTS).read_bytes() == weights
    assert (folder / "README.md").read_text() == "mine"
    gates = host.load_gates(folder)
    assert gates.calibration == calibration(value=0.8)
    assert gates.policy == "calibrated"
    with pytest.raises(FileNotFoundError, match=r"holds no gates\.safetensors"):
        host.save_calibration(folder.parent / "none", Calibrated(calibration()))


def test_a_calibration_survives_load_use_and_save(tiny, saved, tmp_path):
    model, folder = saved
    host.attach(model, host.load_gates(folder))
    host.save_gates(model, tmp_path / "used")
    again = host.load_gates(tmp_path / "used")
    assert (again.calibration, again.policy) == (calibration(), "calibrated,sink_blocks=1")
    # Another default keeps it too, to be asked for by name.
    host.save_gates(again, tmp_path / "other", policy="top_k:0.5")
    other = host.load_gates(tmp_path / "other")
    assert (other.calibration, other.policy) == (calibration(), "top_k:0.5")
    host.attach(model, other)
    host.set_policy(model, "calibrated,dense_last_rows=1")
    assert host.load_gates(tmp_path / "used").calibration == calibration()


def test_calibrated_without_a_calibration_is_one_clear_sentence(tiny):
    model = tiny.make()
    gates = tiny.gates_for(model)
    for ask in (
        lambda: host.attach(model, gates, "calibrated"),
        lambda: host.set_policy(host.attach(model, gates, TopK(1.0)), "calibrated"),
        lambda: host.save_gates(gates, "nowhere", policy="calibrated"),
    ):
        with pytest.raises(ValueError, match="needs gates that were calibrated, and these were not; run"):
            ask()


def edited(**changes):
    def edit(folder):
        data = json.loads((folder / CALIBRATION).read_text())
        (folder / CALIBRATION).write_text(json.dumps({**data, **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CALIBRATION).write_text("{"), "is damaged or not of these gates"),
        (lambda f: (f / CALIBRATION).write_text("[]"), "is damaged or not of these gates"),
        (edited(format=2), "reads format 1"),
        (edited(gates_sha256="0"), r"for other weights than those in gates\.safetensors"),
        (edited(laws={"0": [[0, 0, 0]] * 4}), r"for layers \[0\], the gates are for \[0, 1\]"),
        (edited(laws={"0": [[0, 0, 0]] * 3, "1": [[0, 0, 0]] * 4}), "a law for each of 4 heads"),
        (edited(extra=1), "its keys must be"),
        (lambda f: (f / CALIBRATION).unlink(), "needs gates that were calibrated"),
    ],
)
def test_damaged_and_foreign_calibrations_are_refused(saved, damage, message):
    _, folder = saved
    damage(folder)
    with pytest.raises(ValueError, match=message):
        host.load_gates(folder)


def test_an_interrupted_save_leaves_the_old_policy(saved, monkeypatch):
    _, folder = saved
    before = (folder / CONFIG).read_text()
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.save_calibration(folder, Calibrated(calibration(value=0.7)))
    monkeypatch.undo()
    assert (folder / CONFIG).read_text() == before
    assert host.load_gates(folder).calibration == calibration()
