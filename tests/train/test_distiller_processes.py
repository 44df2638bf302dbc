"""Several processes train what one process trains, killed or not: real processes over gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from seerattention.train import DistillConfig, Distiller, Packs
from seerattention.hosts.transformers import new_gates
base, text, out, fsdp = sys.argv[1:5]
model = LlamaForCausalLM.from_pretrained(base).eval()
torch.manual_seed(1)
gates = new_gates(model, block_size=16, q_sub_block=8, k_sub_block=8)
text = np.load(text)
documents = lambda: np.split(text, [100, 230, 250, 700, 1100])
batches = Packs(documents, 256, 4, 64)
config = DistillConfig(steps=12, save_every=3, grad_accum=2, eval_every=4)
trainer = Distiller(model, gates, batches, config, out=Path(out), heldout=[text[-256:]],
    shard=fsdp == "True")
assert trainer.reach.has_gaps
main = trainer.accelerator.is_main_process
if main:
    print("from", trainer.done, trainer.accelerator.num_processes, os.getpid(), flush=True)
for step in trainer.run():
    if main:
        print(step.step, flush=True)
    if step.step > int(os.environ["KILLED_AFTER"]):
        signal.pause()
"""


@pytest.fixture
def files(model, text, tmp_path):
    model.save_pretrained(tmp_path / "base")
    np.save(tmp_path / "text.npy", text)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


@pytest.fixture
def alone(files, run_script, monkeypatch):
    """Train to the end in this one process, and return what was printed."""
    monkeypatch.setenv("KILLED_AFTER", "99")

    def train(name):
        printed = run_script(files / "train.py", files / "base", files / "text.npy", files / name, False)
        return [line.split() for line in printed.splitlines()]

    return train


def two(files, name, *, kill_after=None, fsdp=False, processes=2):
    """Train in some processes to the end, or kill all at once after a step; return what was printed."""
    arguments = files / "train.py", files / "base", files / "text.npy", files / name, fsdp
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch.append(f"--nproc-per-node={processes}")
    # The signal finds the next step at work, or waiting for it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILLED_AFTER": str(kill_after or 99)}
    with (
        (files / f"{name}.err").open("a") as errors,
        subprocess.Popen(
            [*launch, *map(str, arguments)],
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


def test_two_processes_equal_one_killed_or_not_sharded_or_not(files, alone):
    """On packed documents, and with gradients of two batches added up."""
    assert alone("one")[0][:3] == ["from", "0", "1"]
    assert two(files, "two")[0][:3] == ["from", "0", "2"]
    close(files / "one", files / "two")
    two(files, "killed", kill_after=7)
    # What two processes left is continued by one as well.
    shutil.copytree(files / "killed", files / "fewer")
    assert two(files, "killed")[0][1:3] == ["6", "2"]
    whole, killed = (load_file(files / n / "checkpoint.safetensors") for n in ("two", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    assert alone("fewer")[0][1:3] == ["6", "1"]
    close(files / "one", files / "fewer")
    rows = [json.loads(line) for line in (files / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["heldout_recall"] is not None] == [4, 8, 12]

    two(files, "sharded", fsdp=True)
    close(files / "one", files / "sharded")
    one, both, sharded = (json.loads((files / n / "run.json").read_text()) for n in ("one", "two", "sharded"))
    assert [run["sharded"] for run in (one, both, sharded)] == [False, False, True]
    assert [run["processes"] for run in (one, both)] == [1, 2]
    sums = {run[f"base_checksum_{when}"] for run in (one, both, sharded) for when in ("before", "after")}
    assert len(sums) == 1
    assert sums != {""}


SHARED = """
import json, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from seerattention.train import DistillConfig, Distiller
from seerattention.hosts.transformers import new_gates
base, text, out, fsdp = sys.argv[1:5]
text = np.load(text)
# The last block is short, and with one text more rows than teach in a step.
wide = lambda index: np.stack([text[:505], text[500:1005]])
long = lambda index: text[None, 40 * index : 40 * index + 1003]
for name, batches, reach, block in (("wide", wide, 505, 16), ("long", long, 4096, 4)):
    model = LlamaForCausalLM.from_pretrained(base).eval()
    model.config.max_position_embeddings = 8192
    torch.manual_seed(1)
    gates = new_gates(model, block_size=block, q_sub_block=block // 2, k_sub_block=block // 2)
    config = DistillConfig(steps=6, save_every=3, eval_every=3)
    trainer = Distiller(model, gates, batches, config, out=Path(out) / name, heldout=[text[-256:]],
        reach=reach, shard=fsdp == "True", share_text=True)
    for step in trainer.run():
        pass
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_texts_equal_one(files, run_script, processes):
    (files / "train.py").write_text(SHARED)
    run_script(files / "train.py", files / "base", files / "text.npy", files / "one", False)
    two(files, "shared", processes=processes)
    for name in ("wide", "long"):
        close(files / "one" / name, files / "shared" / name)
        losses = [
            [
                json.loads(line)["loss"]
                for line in (files / run / name / "metrics.jsonl").read_text().splitlines()
            ]
            for run in ("one", "shared")
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    if processes == 2:
        two(files, "sharded", fsdp=True)
        close(files / "one" / "long", files / "sharded" / "long")
