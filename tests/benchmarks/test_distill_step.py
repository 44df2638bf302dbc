import json
import subprocess
import sys
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


def test_processes_share_the_sequence(tmp_path):
    out = tmp_path / "step.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = ["--shape", "small", "--device", "cpu", "--repeats", "1", "--tokens", "512", "--out", str(out)]
    done = subprocess.run([*launch, SCRIPT, *asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["tokens"], row["processes"]) == (512, 2)
    assert min(row["step_s"], row["forward_s"], row["ratio"]) > 0
