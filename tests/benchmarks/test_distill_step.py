import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "distill_step.py"


def test_a_step_is_measured_beside_the_forward_pass(tmp_path):
    out = tmp_path / "step.json"
    options = ("--shape", "tiny", "--device", "cpu", "--repeats", 1, "--tokens", 256, "--tokens", 512)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *map(str, options)],
        capture_output=True, text=True, check=False, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [256, 512]
    for row in rows:
        assert row["step_s"] > row["forward_s"] > 0
        assert set(row["parts_s"]) == {"pooled attention", "gate", "optimizer", "rest"}
        assert all(seconds > 0 for seconds in row["parts_s"].values())
