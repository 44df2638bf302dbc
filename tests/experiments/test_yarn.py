"""The YaRN experiment on a CPU, at a size that shows it runs: stopped on the way, it continues."""

import json
import sys
import tomllib
from pathlib import Path

import pytest

from experiments.yarn import run as experiment

FOLDER = Path(experiment.__file__).parent


def run(monkeypatch, out, *more):
    monkeypatch.setattr(sys, "argv", ["run.py", "--smoke", "--device", "cpu", "--out", str(out), *more])
    experiment.main()


def test_a_stopped_run_continues_and_compares_dense_posthoc_and_joint(monkeypatch, tmp_path, capsys):
    original, asked = experiment.Experiment._look_at_the_clock, []

    def look(self):
        asked.append(len(self.results()["rows"]))
        if len(asked) == 4:
            # The time ends during the next training.
            self.deadline = 0.0
            return
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.Experiment, "_look_at_the_clock", look)
        run(patch, tmp_path)
    assert "time is up; run the same command again" in capsys.readouterr().out
    before = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in before["rows"][::2]] == ["teacher, its own RoPE", "YaRN, not trained"]
    assert before["steps"] == 2
    checkpoint = tmp_path / "dense" / "checkpoint.safetensors"
    assert checkpoint.exists()
    assert not (tmp_path / "dense" / "model").exists()

    with pytest.raises(SystemExit, match="holds another run"):
        run(monkeypatch, tmp_path, "--set", '{"lr": 0.5}')
    with pytest.raises(SystemExit, match=r"unknown settings \['rate'\]"):
        run(monkeypatch, tmp_path, "--set", '{"rate": 0.5}')
    run(monkeypatch, tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["rows"][: len(before["rows"])] == before["rows"]
    # Nothing is done again by processes of their own.
    run(monkeypatch, tmp_path, "--only", "joint-0.1", "posthoc")
    assert json.loads((tmp_path / "results.json").read_text()) == report
    training = report["training"]
    assert (
        training["dense"]["tokens"] == training["joint-0.1"]["tokens"] == report["tokens_per_method"] == 1024
    )
    cells = {(r["method"], r["asked"], r["tokens"]) for r in report["rows"]}
    for length in (256, 512):
        assert ("YaRN, dense training", None, length) in cells
        for density in (0.5, 0.1):
            assert ("gates distilled afterwards", density, length) in cells
            assert ("joint", density, length) in cells
    assert all(
        r["by_position"][-1]["last"] == r["tokens"] - 1 and r["questions"] == 2 for r in report["rows"]
    )
    table = (tmp_path / "results.md").read_text()
    assert table.strip() in capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[1] for line in lines[1:8]] == ["dense"] * 3 + ["50%", "90%"] * 2
    config = json.loads((tmp_path / "joint-0.1" / "model" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == 512


def test_the_teacher_is_one_of_8192_tokens():
    recipe = tomllib.loads((FOLDER / "teacher.toml").read_text())
    assert [stage["length"] for stage in recipe["stage"]] == [512, 2048, 8192]
    assert recipe["model"]["max_position_embeddings"] == 8192


def test_processes_share_the_work(monkeypatch, tmp_path, capsys):
    with pytest.raises(
        SystemExit, match=r"does not know \['joint-0.3'\]; there are dense, posthoc, joint-0.5"
    ):
        run(monkeypatch, tmp_path, "--only", "joint-0.3")
    run(monkeypatch, tmp_path, "--only")
    shared = json.loads((tmp_path / "results.json").read_text())
    assert shared["steps"] == 2
    assert {row["method"] for row in shared["rows"]} == {"teacher, its own RoPE", "YaRN, not trained"}
    with pytest.raises(SystemExit, match="first run --only dense"):
        run(monkeypatch, tmp_path, "--only", "posthoc")
    run(monkeypatch, tmp_path, "--only", "joint-0.1")
    run(monkeypatch, tmp_path, "--only", "dense")
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(dict.fromkeys(row["key"] for row in report["rows"][4:])) == [
        "YaRN, dense training",
        "joint-0.1",
    ]
    assert list(report["training"]) == ["gates-warm", "dense", "joint-0.1"]
