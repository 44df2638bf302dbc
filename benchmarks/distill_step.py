"""What a distillation step costs beside the dense forward pass: a Llama-3.1-8B shape, random weights.

python benchmarks/distill_step.py --out benchmarks/results/h200/distill_step.json

The forward pass is the decoder alone with cuDNN's attention; a training step is one sequence. Processes
that torchrun starts share the sequence, and the forward pass beside their step is the same without learning:

torchrun --nproc-per-node 2 benchmarks/distill_step.py --tokens 131072 --out shared.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import script
import torch
from end_to_end import Parts
from torch.nn.attention import sdpa_kernel

from seerattention.bench.models import SHAPES, random_config, random_model
from seerattention.hosts.transformers import new_gates
from seerattention.ops.dense_attention import CUDNN_FIRST
from seerattention.train import DistillConfig, Distiller, distiller
from seerattention.train.shared_text import SharedText

PARTS = ("pooled attention", "gate", "optimizer", "rest")
#: Tokens of the published recipe, which took about 40 A100 hours (arXiv 2410.13276, section 4).
RECIPE_TOKENS = 0.5e9


@torch.inference_mode()
def forward(model: Any, ids: torch.Tensor) -> None:
    """Run the decoder densely, without the head."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True) if ids.is_cuda else ExitStack():
        model.get_decoder()(ids, use_cache=False)


@contextmanager
def watched(parts: Parts, training: Distiller) -> Iterator[None]:
    """Count the parts of every step inside this context."""
    replaced = (
        (distiller, "_with_targets", "pooled attention"),
        (training, "_learn", "gate"),
        (training.optimizer, "step", "optimizer"),
    )
    with ExitStack() as stack:
        for owner, name, part in replaced:
            stack.enter_context(patch.object(owner, name, partial(parts.wrapped, part, getattr(owner, name))))
        yield


def timed(run: Any, cuda: bool, repeats: int) -> tuple[list[float], float | None]:
    """Return the seconds of each call after a first one, and the peak memory in GB (None on a CPU)."""
    run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        parts = Parts(cuda)
        parts.wrapped("whole", run)
        seconds.append(parts.seconds()["whole"])
    return seconds, round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None


def measure(model: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure forward pass and training step at one length."""
    cuda = model.device.type == "cuda"
    batch = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens))
    ids = torch.from_numpy(batch).to(model.device)
    dense, dense_gb = timed(lambda: forward(model, ids), cuda, repeats)
    torch.manual_seed(0)
    gates = new_gates(model)
    training = Distiller(model, gates, lambda step: batch, DistillConfig(steps=repeats + 2))
    steps = training.run()
    train, train_gb = timed(lambda: next(steps), cuda, repeats)
    parts = Parts(cuda)
    with watched(parts, training):
        parts.wrapped("whole", lambda: next(steps))
    spent = parts.seconds()
    whole = spent.pop("whole")
    spent["rest"] = whole - sum(spent.values())
    step, base = median(train), median(dense)
    return {
        "tokens": tokens,
        "forward_s": round(base, 4),
        "forward_range_s": [round(min(dense), 4), round(max(dense), 4)],
        "step_s": round(step, 4),
        "step_range_s": [round(min(train), 4), round(max(train), 4)],
        "ratio": round(step / base, 3),
        "parts_s": {part: round(spent.get(part, 0.0), 4) for part in PARTS},
        "forward_peak_gb": dense_gb,
        "step_peak_gb": train_gb,
        "gpu_hours_per_0.5b_tokens": round(RECIPE_TOKENS / tokens * step / 3600, 2),
    }


def measure_shared(model: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure a training step of processes that share a sequence, and the same without learning."""
    batch = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens))
    torch.manual_seed(0)
    gates, cuda = new_gates(model), model.device.type == "cuda"
    config = DistillConfig(steps=repeats + 1)
    training = Distiller(model, gates, lambda step: batch, config, share_text=True)
    wait = training.accelerator.wait_for_everyone

    def together(run: Callable[[], object]) -> None:
        wait()
        run()
        wait()

    with patch.object(SharedText, "taught", lambda *place: iter(())):
        dense, dense_gb = timed(lambda: together(lambda: training.accumulate(batch, 0.1)), cuda, repeats)
    steps = training.run()
    train, train_gb = timed(lambda: together(lambda: next(steps)), cuda, repeats)
    step, base = median(train), median(dense)
    return {
        "tokens": tokens,
        "processes": training.accelerator.num_processes,
        "forward_s": round(base, 4),
        "forward_range_s": [round(min(dense), 4), round(max(dense), 4)],
        "step_s": round(step, 4),
        "step_range_s": [round(min(train), 4), round(max(train), 4)],
        "ratio": round(step / base, 3),
        "forward_peak_gb": dense_gb,
        "step_peak_gb": train_gb,
    }


def main() -> None:
    """Measure every length; the report is written after each."""
    parser = script.parser(__doc__, [32768, 65536], repeats=3)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    shared, first = torch.distributed.is_torchelastic_launched(), os.environ.get("RANK", "0") == "0"
    if shared and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    config = random_config(args.shape, max(args.tokens), args.layers)
    model = random_model(config, args.device, dtype)
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        rows.append((measure_shared if shared else measure)(model, tokens, args.repeats))
        if first:
            script.write(args.out, rows, args.device, **script.model_settings(model, args.shape))
            print(json.dumps(rows[-1], indent=2), flush=True)
    if shared:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
