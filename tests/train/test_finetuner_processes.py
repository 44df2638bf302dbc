"""Several processes, sharded or not, train what one process trains: real processes over gloo."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from seerattention.train import FinetuneConfig, Finetuner, TextWindows, prepare, save_finetuned

SETTINGS = {"steps": 2, "lr": 1e-3, "density": [0.3, 0.6], "warmup_gate_steps": 1, "save_every": 1}

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from seerattention.train import TextWindows
from seerattention.train.processes import make_accelerator
from seerattention.train import FinetuneConfig, Finetuner, prepare, save_finetuned
from seerattention.hosts.transformers import new_gates
base, text, out, settings = sys.argv[1:5]
settings = json.loads(settings)
accelerator = make_accelerator("cpu")
for shard in (False, True):
    # The sharded run stops after a step and goes on from its checkpoint.
    for stop in (True, False) if shard else (False,):
        load = lambda: LlamaForCausalLM.from_pretrained(base)
        model = load()
        torch.manual_seed(1)
        gates = new_gates(model, block_size=16, q_sub_block=8, k_sub_block=8)
        folder = Path(out) / str(shard)
        config = FinetuneConfig(**{**settings, "density": tuple(settings["density"])})
        tuner = Finetuner(prepare(model), gates, TextWindows(np.load(text), 96, 2), config, out=folder,
            accelerator=accelerator, shard=shard)
        assert tuner.done == (shard and not stop)
        for step in tuner.run():
            if stop:
                break
    save_finetuned(tuner, folder, policy="top_k:0.3", rebuild=lambda: prepare(load()))
accelerator.end_training()
"""


def close(a, b):
    """Weights of two runs, equal to the rounding of sums in another order."""
    assert a.keys() == b.keys()
    for key in a:
        # Adam divides by the gradient's size, so rounding moves a weight by a share of the rate.
        assert float((a[key] - b[key]).abs().max()) <= 1e-2 * SETTINGS["lr"] * SETTINGS["steps"], key


def test_two_processes_sharded_or_not_equal_one(tiny, text, tmp_path):
    # Tied weights, which one unit must hold.
    tiny.make(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    np.save(tmp_path / "text.npy", text)
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    arguments = (
        tmp_path / "train.py",
        tmp_path / "base",
        tmp_path / "text.npy",
        tmp_path,
        json.dumps(SETTINGS),
    )
    command = [sys.executable, *launch, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = FinetuneConfig(**{**SETTINGS, "density": (0.3, 0.6)})
    tuner = Finetuner(
        prepare(model), tiny.gates_of(model), TextWindows(text, 96, 2), config, out=tmp_path / "one"
    )
    list(tuner.run())
    save_finetuned(tuner, tmp_path / "one", policy="top_k:0.3")
    for kind in ("False", "True"):
        one, two = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", kind))
        close(one, two)
        one, two = (load_file(tmp_path / n / "gates" / "gates.safetensors") for n in ("one", kind))
        close(one, two)
        assert "lm_head.weight" not in one
        run = json.loads((tmp_path / kind / "run.json").read_text())
        assert run["processes"] == 2
        assert run["sharded"] == (kind == "True")
        rows = [
            [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
            for n in ("one", kind)
        ]
        for mine, theirs in zip(*rows, strict=True):
            for key in ("loss", "gate_loss", "norm", "gate_norm", "density", "tokens"):
                assert theirs[key] == pytest.approx(mine[key], rel=1e-3), (key, kind)
    assert not torch.equal(tuner.model.model.norm.weight, torch.ones_like(tuner.model.model.norm.weight))
