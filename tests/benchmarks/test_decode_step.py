"""Whole steps of decoding, on a model small enough for a CPU."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode_step.py"


def test_steps_of_a_tiny_model_are_timed_dense_and_sparse(run_script, tmp_path):
    out = tmp_path / "step.json"
    options = (
        "--shape",
        "small",
        "--sizes",
        "1x512",
        "2x320",
        "--steps",
        1,
        "--repeats",
        1,
        "--device",
        "cpu",
    )
    printed = run_script(SCRIPT, *options, "--density", 0.25, "--out", out)
    report = json.loads(out.read_text())
    assert report["density"] == 0.25
    methods = ["dense, sdpa", "dense, best kernel", "sparse"]
    assert [(r["batch"], r["tokens"], r["method"]) for r in report["rows"]] == [
        (batch, tokens, method) for batch, tokens in ((1, 512), (2, 320)) for method in methods
    ]
    assert [r["how"] for r in report["rows"][:3]] == ["chosen by PyTorch", "dense sdpa", "token_budget:128"]
    for row in report["rows"]:
        assert row["tokens_per_s"] * row["ms"] == pytest.approx(row["batch"] * 1e3, rel=0.01)
    assert "token_budget:128" in printed
