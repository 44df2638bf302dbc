"""The bundled teacher, gates and text, and the demo's measurements on a small plan."""

import importlib
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from seerattention import cli
from seerattention.demo import run as module
from seerattention.demo.run import Demo, LiveBatches, Plan, methods
from seerattention.hosts.transformers import BaseInfo, attach, attached, detach
from seerattention.measure import bundled
from seerattention.measure.needle import NeedleTask

PLAN = Plan(tokens=2048, windows=1, documents=1, recall_rows=4, lengths=(1024, 2048))


@pytest.fixture(scope="module")
def teacher():
    return bundled.load_teacher()


@pytest.fixture(scope="module")
def demo(teacher):
    model, tokenizer = teacher
    _, text = bundled.text_tokens(tokenizer)
    return Demo(model, tokenizer, text, PLAN)


def test_the_teacher_finds_needles_and_writes_words(demo, teacher):
    row = demo.measure(methods(bundled.load_teacher_gates(), None)[0], None)
    assert (row["density"], row["recall"], row["speedup"]) == (1, 1, 1)
    # Results of the card: 99.4 % at 2k tokens, 8 questions here.
    assert row["needle"] >= 7 / 8
    model, tokenizer = teacher
    prompt = tokenizer("She opened the window and", return_tensors="pt")["input_ids"]
    written = tokenizer.decode(model.generate(prompt, max_new_tokens=20, do_sample=False)[0])
    assert len(written.split()) > 12


def test_the_gates_are_the_teachers_and_small(teacher):
    gates = bundled.load_teacher_gates()
    assert not gates.base.differences(BaseInfo.of(teacher[0]))
    assert gates.policy == "top_k:0.1,sink_blocks=1"
    size = (bundled.TEACHER / "model.safetensors").stat().st_size
    assert size <= 32e6
    rows = json.loads((bundled.TEACHER / "results.json").read_text())["lengths"]
    results = {row["tokens"]: row["needle"] for row in rows}
    assert results[8192] >= 0.95
    assert results[16384] >= 0.95
    assert results[32768] >= 0.90


def test_rows_tell_methods_apart(demo):
    gates = bundled.load_teacher_gates()
    named = {(m.name, m.density): m for m in methods(gates, gates)}
    assert len(named) == 9
    assert not attached(demo.model)
    sparse = demo.measure(named["SeerAttention", 0.2], 1.0)
    random = demo.measure(named["random", 0.1], 1.0)
    assert not attached(demo.model)
    assert set(sparse) == {
        "method",
        "density",
        "tokens",
        "perplexity",
        "needle",
        "needle_dense_last",
        "recall",
        "prefill_s",
        "speedup",
    }
    assert 0.1 < random["density"] < sparse["density"] < 0.35
    assert sparse["recall"] > random["recall"]
    assert sparse["perplexity"] < random["perplexity"]
    assert sparse["needle"] >= random["needle"]


def test_dense_last_rows_equal_a_run_of_their_own(demo):
    """The shortcut through the KV cache gives what a whole pass with dense last rows gives."""
    from seerattention.measure.retrieval import retrieval

    method = next(m for m in methods(bundled.load_teacher_gates(), None) if m.density == 0.05)
    fast = demo.measure(method, 1.0)["needle_dense_last"]
    attach(demo.model, method.scorer, "top_k:0.05,sink_blocks=1,dense_last_rows=2", min_tokens=0)
    try:
        slow = retrieval(demo.model, demo.documents)
    finally:
        detach(demo.model)
    assert fast == slow


def test_live_batches_differ_from_the_evaluation_and_repeat(teacher):
    from seerattention.train import TextWindows

    _, tokenizer = teacher
    training, text = bundled.text_tokens(tokenizer)
    assert len(training) == bundled.TRAINING_TOKENS
    assert not np.array_equal(training[:100], text[:100])
    batches = LiveBatches(NeedleTask(tokenizer, training), TextWindows(training, 1024))
    assert np.array_equal(batches(4), batches(4))
    assert batches(4).shape == batches(5).shape == (1, 1024)
    assert "The number of the" in tokenizer.decode(batches(4)[0])
    assert "The number of the" not in tokenizer.decode(batches(5)[0])


def test_too_little_text_is_refused(teacher):
    model, tokenizer = teacher
    with pytest.raises(ValueError, match="the demo needs 2048 tokens of text, got 100"):
        Demo(model, tokenizer, np.zeros(100, dtype=np.int64), PLAN)


def test_a_missing_teacher_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(bundled, "TEACHER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"none is missing; reinstall"):
        bundled.load_teacher()


def test_the_command_writes_its_report_and_pictures(monkeypatch, tmp_path):
    """The whole command on a small plan; `make demo` runs it at its real size."""
    command = importlib.import_module("seerattention.cli.demo")
    monkeypatch.setattr(command, "FEWEST_STEPS", 2)
    monkeypatch.setattr(command, "MOST_STEPS", 2)
    plan = Plan(tokens=1024, live_tokens=512, windows=1, documents=1, recall_rows=4, lengths=(256, 512, 1024))
    monkeypatch.setattr(module, "Plan", lambda: plan)
    arguments = ["demo", "--longest", "512", "--out", str(tmp_path / "demo")]
    result = CliRunner().invoke(cli.app(), arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert [r["method"] for r in report["rows"]][:2] == ["dense", "SeerAttention"]
    assert len(report["rows"]) == 9
    assert report["questions"] == 8
    assert [r["tokens"] for r in report["lengths"]] == [256, 512]
    assert report["versions"]["torch"] == torch.__version__
    for figure in report["figures"]:
        picture = (tmp_path / "demo" / figure).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
    too_short = CliRunner().invoke(cli.app(), ["demo", "--longest", "100"])
    assert too_short.exit_code == 2
    assert "--longest must be at least 256, got 100" in too_short.output
    assert "8 needle questions" in " ".join(result.output.split())
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == sorted(
        [*report["figures"], "report.json"]
    )
