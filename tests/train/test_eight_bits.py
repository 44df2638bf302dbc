"""Gates score in eight bits where held-out text says that they choose as well."""

import pytest

from seerattention.train import DistillConfig, Distiller, TextWindows, eight_bits
from seerattention.train.eight_bits import Recalls, try_eight_bits


@pytest.fixture
def trainer(tiny, model, text, monkeypatch):
    monkeypatch.setattr(eight_bits, "_faster", lambda device: True)

    def make(heldout=True, **gates):
        texts = [text[:256]] if heldout else []
        config = DistillConfig(steps=1, recall_density=0.2)
        return Distiller(
            model, tiny.gates_of(model, **gates), TextWindows(text, 256), config, heldout=texts, reach=256
        )

    return make


def test_they_are_taken_where_recall_is_as_good(trainer):
    made = trainer()
    found = try_eight_bits(made, 0.01)
    assert found.taken
    assert found.rounded != found.taught
    assert abs(found.rounded - found.taught) < 0.01
    assert made.gates.config.score_dtype == "float8_e4m3fn"
    assert {gate.config.score_dtype for _, gate in made.gates.items()} == {"float8_e4m3fn"}
    assert "are taken" in str(found)


@pytest.mark.parametrize(("rounded", "taken"), [(0.9, True), (0.8981, True), (0.8979, False), (0.3, False)])
def test_what_may_be_lost_decides(trainer, monkeypatch, rounded, taken):
    made = trainer()
    before = made.heldout_recall((0.2,))

    def recall(densities):
        assert densities == (0.2,)
        return {"prefill": [0.9 if made.gates.config.score_dtype is None else rounded]}

    with monkeypatch.context() as patched:
        patched.setattr(made, "heldout_recall", recall)
        assert try_eight_bits(made, 0.002) == Recalls(0.9, rounded, taken)
    assert made.gates.config.score_dtype == ("float8_e4m3fn" if taken else None)
    assert (made.heldout_recall((0.2,)) == before) == (not taken)


def test_who_is_not_asked(trainer, monkeypatch):
    assert try_eight_bits(trainer(heldout=False), 1.0) is None
    assert try_eight_bits(trainer(score_dtype="float8_e4m3fn"), 1.0) is None
    assert try_eight_bits(trainer(phase="decode"), 1.0) is None
    monkeypatch.undo()
    made = trainer()
    assert try_eight_bits(made, 1.0) is None
    assert made.gates.config.score_dtype is None


def test_what_is_said():
    said = str(Recalls(0.91234, 0.9121, taken=True))
    assert "eight bits are taken, which takes less on Hopper GPUs: held-out recall 0.9121, 0.9123" in said
    assert "are not taken: held-out recall 0.8000, 0.9000" in str(Recalls(0.9, 0.8, taken=False))
