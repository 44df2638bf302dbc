"""Time to the first token, on a model small enough for a CPU."""

import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "end_to_end.py"


def test_end_to_end_runs_on_a_tiny_model(run_script, tmp_path):
    out = tmp_path / "e.json"
    options = ("--shape", "small", "--tokens", 300, "--repeats", 1, "--device", "cpu", "--out", out)
    printed = run_script(SCRIPT, *options)
    report = json.loads(out.read_text())
    assert [row["method"] for row in report["rows"]] == ["dense", "published", "default", "8-bits"]
    for row in report["rows"]:
        assert all(row["parts_s"][part] > 0 for part in ("attention", "mlp", "projections"))
        assert (row["parts_s"]["selection"] > 0) == (row["method"] != "dense")
    assert "published" in printed
