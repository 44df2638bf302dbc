import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "distill_step.py"


def test_a_step_is_measured_beside_the_forward_pass(run_script, tmp_path):
    out = tmp_path / "step.json"
    options = ("--shape", "small", "--device", "cpu", "--repeats", 1, "--tokens", 256, 512)
    run_script(SCRIPT, "--out", out, *options)
    rows = json.loads(out.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [256, 512]
    for row in rows:
        assert row["step_s"] > row["forward_s"] > 0
        assert set(row["parts_s"]) == {"pooled attention", "gate", "optimizer", "rest"}
        assert all(seconds > 0 for seconds in row["parts_s"].values())
