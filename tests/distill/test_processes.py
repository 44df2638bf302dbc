"""Several processes train what one process trains, killed or not: real processes over gloo."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from seerattention.distill import DistillConfig, Distiller, Packs, TextWindows
from seerattention.models import new_gates
base, text, out, packed, accum = sys.argv[1:6]
model = LlamaForCausalLM.from_pretrained(base).eval()
torch.manual_seed(1)
gates = new_gates(model, block_size=16, q_sub_block=8, k_sub_block=8)
text = np.load(text)
documents = lambda: np.split(text, [100, 230, 250, 700, 1100])
batches = Packs(documents, 256, 4, 64) if packed == "packed" else TextWindows(text, 128, 4)
config = DistillConfig(steps=12, save_every=3, grad_accum=int(accum), eval_every=4)
trainer = Distiller(model, gates, batches, config, out=Path(out), heldout=[text[-256:]],
    shard=sys.argv[6] == "True")
main = trainer.accelerator.is_main_process
if main:
    print("from", trainer.done, trainer.accelerator.num_processes, os.getpid(), flush=True)
for step in trainer.run():
    if main:
        print(step.step, flush=True)
    if step.step >= int(os.environ["SLOW_FROM"]):
        time.sleep(2)
"""


def command(processes, script, *arguments):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launch, str(script), *map(str, arguments)]


@pytest.fixture
def files(model, text, tmp_path):
    model.save_pretrained(tmp_path / "base")
    np.save(tmp_path / "text.npy", text)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def train(files, name, processes, *, packed="windows", accum=1, kill_after=None, fsdp=False):
    """Train to the end, or kill all processes at once after a step; return what was printed."""
    arguments = files / "base", files / "text.npy", files / name, packed, accum, fsdp
    # Slow from then on, so that the signal finds the next step at work.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLOW_FROM": str(kill_after or 99)}
    with (
        (files / f"{name}.err").open("a") as errors,
        subprocess.Popen(
            command(processes, files / "train.py", *arguments),
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True,
        ) as run,
    ):  # fmt: skip
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            lines.append(line.split())
            if lines[-1] == [str(kill_after)]:
                _kill_all(run.pid)
        code = run.wait()
    if kill_after is None:
        assert code == 0, (files / f"{name}.err").read_text()
    return lines


def _kill_all(launcher):
    """SIGKILL a launcher and its workers, which it puts into sessions of their own."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=False
    ).stdout.split()
    for pid in [launcher, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)


def close(a, b):
    """Gates of two runs, equal to the rounding of sums in another order."""
    a, b = (load_file(x / "checkpoint.safetensors") for x in (a, b))
    assert a.keys() == b.keys()
    for key in a:
        if key.startswith("gates."):
            # Adam divides by the gradient's size, so rounding moves a weight by a share of the rate.
            moved = float((a[key] - b[key]).abs().max())
            assert moved <= 1e-3 * 1e-3 * 12, (key, moved)


def test_two_processes_equal_one_on_packed_documents(files):
    train(files, "one", 1, packed="packed")
    train(files, "two", 2, packed="packed")
    close(files / "one", files / "two")


def test_two_processes_equal_one_killed_or_not(files):
    assert train(files, "one", 1)[0][:3] == ["from", "0", "1"]
    assert train(files, "two", 2)[0][:3] == ["from", "0", "2"]
    train(files, "killed", 2, kill_after=7)
    again = train(files, "killed", 2)
    assert again[0][1] == "6", again
    close(files / "one", files / "two")
    whole, killed = (load_file(files / n / "checkpoint.safetensors") for n in ("two", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    rows = [json.loads(line) for line in (files / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["heldout_recall"] is not None] == [4, 8, 12]
    run = json.loads((files / "two" / "run.json").read_text())
    assert run["base_checksum_before"] == run["base_checksum_after"] != ""
    assert run["processes"] == 2


def test_accumulation_and_another_number_of_processes_after_a_kill_change_nothing(files):
    train(files, "one", 1, accum=2)
    train(files, "other", 2, accum=2, kill_after=7)
    assert train(files, "other", 1, accum=2)[0][1:3] == ["6", "1"]
    close(files / "one", files / "other")


def test_a_base_sharded_by_fsdp2_trains_the_same_gates(files):
    train(files, "one", 1)
    train(files, "sharded", 2, fsdp=True)
    close(files / "one", files / "sharded")
    one, sharded = (json.loads((files / n / "run.json").read_text()) for n in ("one", "sharded"))
    assert sharded["sharded"] is True
    assert one["sharded"] is False
    assert one["base_checksum_before"] == sharded["base_checksum_after"]
