"""Time the gate's part of a distillation step on a GPU, beside the same scores in PyTorch.

python benchmarks/score_blocks.py --out benchmarks/results/<device>/score_blocks.json

Scores and gradients of a Llama-3.1-8B layer with the default gate (8-token sub-blocks, E = 128), bf16, then
everything that a layer learns: pools, projection, rotation, scores, loss, recall, and all of it backward.
PyTorch's path is left out where it would take more than half of the memory or too long (--torch-up-to).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from seerattention.files import staged
from seerattention.gate import AttnGate, GateConfig
from seerattention.measure.versions import versions
from seerattention.ops.score_blocks import BACKENDS, score_blocks
from seerattention.ops.score_blocks._cases import CASES, Case
from seerattention.train import layer, objectives


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median milliseconds on the device after a first call, and the extra peak memory in MB."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The queue is kept full, so that launches cost nothing, as behind a model's own layers.
        torch.cuda._sleep(20_000_000)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times), (torch.cuda.max_memory_allocated() - before) / 1e6


def scoring(case: Case, backend: str) -> dict[str, Callable[[], object]]:
    """Return the passes of one backend, by name."""
    q = torch.randn(1, case.heads, case.queries, case.dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, case.kv_heads, case.keys, case.dim, device="cuda", dtype=torch.bfloat16)
    q, k = q.requires_grad_(), k.requires_grad_()
    gradient = torch.randn(case.blocks, device="cuda")
    made: list[Tensor] = []

    def forward() -> Tensor:
        return score_blocks(q, k, case.sub_blocks, **case.geometry, backend=backend)

    def backward() -> object:
        if not made:
            made.append(forward())
        return torch.autograd.grad(made[0], (q, k), gradient, retain_graph=True)

    return {f"{backend} forward": forward, f"{backend} backward": backward}


def learning(case: Case) -> dict[str, Callable[[], object]]:
    """Return what one layer of a training step does for its gate, whole and in parts."""
    tokens = case.queries * 8
    # As a model's projections leave them: heads after tokens in memory.
    q, k = (
        torch.randn(1, tokens, heads, case.dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (case.heads, case.kv_heads)
    )
    gate = AttnGate(GateConfig(case.heads, case.kv_heads, case.dim)).cuda()
    target = torch.rand(case.blocks, device="cuda").tril()
    target /= target.sum(-1, keepdim=True)
    positions, kl = torch.arange(tokens, device="cuda"), objectives.create("kl")
    scores = torch.randn(case.blocks, device="cuda", requires_grad=True)

    def pool() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            gate.summarise_queries(q, positions=positions)
            gate.compress(k, positions=positions)

    return {
        "learn: whole": lambda: layer.learn(gate, q, k, target, kl, 1.0, 0.1),
        "learn: summaries forward": pool,
        "learn: loss, both passes": lambda: kl(target, scores, (64, 64), tokens).backward(),
        "learn: recall": lambda: layer.sampled_recall(target, scores.detach(), (64, 64), tokens, (0.1,)),
    }


def flops(case: Case, name: str) -> float | None:
    """Operations of the causal products: one forward, one per gradient backward."""
    pairs = case.heads * case.queries * case.keys / 2
    return 2 * case.dim * pairs * (2 if name.endswith("backward") else 1)


def main() -> None:
    """Print a table and write a report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--torch-up-to", type=int, default=32768, help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KERNEL.NAME=VALUE",
        help="launch settings, e.g. back.num_stages=2",
    )  # fmt: skip
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for text in args.set:
        place, value = text.split("=")
        kernel, setting = place.split(".")
        BACKENDS["triton"].LAUNCH["narrow"][kernel][setting] = int(value)
    rows: list[dict[str, Any]] = []
    for case in (c for c in CASES if c.large and c.queries * 8 in args.tokens):
        tokens = case.queries * 8
        calls = scoring(case, "triton") | learning(case)
        if tokens <= args.torch_up_to:
            calls |= scoring(case, "reference")
        for name, run in calls.items():
            ms, extra = timed(run, args.repeats)
            row = {"tokens": tokens, "call": name, "ms": round(ms, 3), "extra_mb": round(extra, 1)}
            rate = ""
            if not name.startswith("learn"):
                row["tflops"] = round(flops(case, name) / ms / 1e9, 1)
                rate = f"{row['tflops']:7.1f} TFLOP/s"
            rows.append(row)
            print(f"{tokens:7} {name:28} {ms:9.3f} ms {extra:9.1f} MB extra {rate}", flush=True)
        del calls
        torch.cuda.empty_cache()
    if args.out:
        report = {
            "versions": versions(), "device": torch.cuda.get_device_name(),
            "date": datetime.now(UTC).date().isoformat(), "set": args.set, "rows": rows,
        }  # fmt: skip
        with staged(args.out.parent) as folder:
            (folder / args.out.name).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
