import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibrate.py"


def test_targets_are_measured_at_three_lengths_and_compared_at_equal_density(run_script, tmp_path):
    out = tmp_path / "calibrate.json"
    options = ("--length", 1024, "--windows", 1, "--densities", 0.4, "--recalls", 0.9, "--training", 2)
    run_script(SCRIPT, "--out", out, *options)
    report = json.loads(out.read_text())
    assert [t["target"] for t in report["targets"]] == ["density", "recall"]
    for target in report["targets"]:
        assert [row["tokens"] for row in target["rows"]] == [512, 1024, 2048]
    (compared,) = report["compared"]
    mine, threshold, *top_k = compared["rows"]
    assert abs(threshold["density"] / mine["density"] - 1) < 0.02
    assert [row["density"] >= mine["density"] for row in top_k] in ([True], [False, True])
    assert [row["row_exponent"] for row in report["row_exponents"]] == [0.0, -0.25, -1.0]
