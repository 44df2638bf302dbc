"""Time the way from q and k to a selection on a GPU, part by part, beside the same in PyTorch.

python benchmarks/select_blocks.py --tokens 32768 131072 --out benchmarks/results/<device>/select_blocks.json
python benchmarks/select_blocks.py --gates sixteen --set select.narrow.COLUMNS=128 select.narrow.num_warps=8
python benchmarks/select_blocks.py --gates sixteen --sweep
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from seerattention.files import staged
from seerattention.gate import AttnGate, GateConfig
from seerattention.measure.versions import versions
from seerattention.ops import select_blocks as select_op
from seerattention.ops import summarise_blocks as summarise_op
from seerattention.ops.select_blocks._cases import CASES, Case
from seerattention.policies import Policy, parse
from seerattention.rows import Rows
from seerattention.testing.inputs import random_qkv

KERNELS: dict[str, Any] = {name: op.BACKENDS["triton"] for name, op in
                           (("select", select_op), ("summarise", summarise_op))}  # fmt: skip

#: Tried by ``--sweep``.
SCORE_SETTINGS = [
    {"ROWS": rows, "COLUMNS": columns, "RESIDENT": resident, "num_warps": warps, "num_stages": stages}
    for rows, columns, resident, warps, stages in itertools.product(
        (64, 128), (64, 128), (1, 2, 4, 8), (4, 8), (1, 2, 3)
    )
    if rows * columns <= 2048 * warps
]
SUMMARY_SETTINGS = [
    {"TOKENS": tokens, "UNROLL": unroll, "num_warps": warps}
    for tokens, unroll, warps in itertools.product((128, 256, 512, 1024, 2048), (2, 4, 8, 16), (4, 8))
]


def gpu_ms(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds on the device; the queue is kept full, so that launches cost nothing."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def call_ms(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds a call takes in a row of calls, launches included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def extra_mb(run: Callable[[], object]) -> float:
    """Peak memory beyond what is there before and what the call returns, in MB."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before - kept
    del result
    return peak / 1e6


@contextmanager
def in_torch() -> Iterator[None]:
    """Summaries by the reference."""
    order = summarise_op.ORDER
    summarise_op.ORDER = ("reference",)
    try:
        yield
    finally:
        summarise_op.ORDER = order


def parts(case: Case, policies: list[Policy], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    q, k, _ = random_qkv(case, dtype=dtype, device="cuda")
    # As a model hands them over: heads after tokens in memory.
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    torch.manual_seed(0)
    config = GateConfig.published(**case.design) if case.published else GateConfig(**case.design)
    gate = AttnGate(config).to("cuda", dtype)
    positions = torch.arange(case.keys, device="cuda")
    k_blocks = gate.compress(k, positions=positions)
    queries = gate.summarise_queries(q, positions=positions)
    args: dict[str, Any] = {"scorer": gate, "rows": Rows.last(case.queries, case.keys)}

    def summarise_k() -> torch.Tensor:
        return gate.compress(k, positions=positions)

    def summarise_q() -> torch.Tensor:
        return gate.summarise_queries(q, positions=positions)

    class Made:
        """The gate with its queries' summaries at hand."""

        block_size, sub_blocks, scale = gate.block_size, gate.sub_blocks, gate.scale
        tokens_per_summary = gate.tokens_per_summary

        def summarise_queries(self, q: torch.Tensor, **_: object) -> torch.Tensor:
            first = int(q.storage_offset() // q.stride(2)) // gate.config.q_sub
            return queries[:, :, first : first + -(-q.shape[2] // gate.config.q_sub)]

    timed: dict[str, Callable[[], object]] = {"summarise q": summarise_q, "summarise k": summarise_k}
    for policy in policies:
        timed[f"score+policy {policy}"] = lambda policy=policy: select_op.select_blocks(
            q, k_blocks, policy=policy, **(args | {"scorer": Made()}), backend="triton"
        )
        timed[f"total {policy}"] = lambda policy=policy: select_op.select_blocks(
            q, summarise_k(), policy=policy, **args, backend="triton"
        )

        def plain(policy: Policy = policy) -> object:
            with in_torch():
                return select_op.select_blocks(q, summarise_k(), policy=policy, **args, backend="composed")

        timed[f"torch {policy}"] = plain
    return timed


def measure(case: Case, policies: list[Policy], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Time every part of one case."""
    rows = []
    for name, run in parts(case, policies, dtype).items():
        few = max(3, repeats // 5) if name.startswith("torch") else repeats
        times = gpu_ms(run, few)
        row = {
            "case": case.name,
            "part": name,
            "ms": round(median(times), 4),
            "range_ms": [round(min(times), 4), round(max(times), 4)],
            "call_ms": round(call_ms(run, few), 4),
            "extra_mb": round(extra_mb(run), 1),
        }
        rows.append(row)
        low, high = row["range_ms"]
        print(
            f"{case.name:16} {name:36} {row['ms']:9.3f} ms ({low:.3f}-{high:.3f})"
            f"  per call {row['call_ms']:8.3f}  extra {row['extra_mb']:8.1f} MB",
            flush=True,
        )
    return rows


def sweep(case: Case, policy: Policy, dtype: torch.dtype, repeats: int) -> None:
    """Print the times of every part under many launch settings, the best first."""
    timed = parts(case, [policy], dtype)
    wide = dtype == torch.float32
    tried = [
        ("summarise q", "summarise", "pool" if case.published else "project", SUMMARY_SETTINGS),
        ("summarise k", "summarise", "project", SUMMARY_SETTINGS),
        (f"score+policy {policy}", "select", "narrow", SCORE_SETTINGS),
    ]
    for part, kernel, group, settings in tried:
        group = "wide" if wide else group
        launch, found = KERNELS[kernel].LAUNCH, []
        before = launch[group]
        for setting in settings:
            launch[group] = dict(setting)
            try:
                found.append((median(gpu_ms(timed[part], repeats)), setting))
            except Exception as error:  # too much shared memory: another type in every version of Triton
                print(f"{part} {setting}: {type(error).__name__}", flush=True)
        launch[group] = before
        for ms, setting in sorted(found, key=lambda f: f[0])[:8]:
            print(f"{case.name:16} {part:28} {ms:9.3f} ms  {setting}", flush=True)


def override(text: str) -> None:
    """Change one launch setting, e.g. ``select.narrow.ROWS=128`` or ``select.SCORE_BYTES=16777216``."""
    path, _, value = text.partition("=")
    kernel, *names, last = path.split(".")
    module: ModuleType = KERNELS[kernel]
    if names:
        settings = module.LAUNCH[names[0]]
        if last not in settings:
            raise ValueError(f"{text!r} names no setting; there are {sorted(settings)}")
        settings[last] = int(value)
    else:
        if not hasattr(module, last):
            raise ValueError(f"{text!r} names no constant of {module.__name__}")
        setattr(module, last, int(value))


def main() -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--gates", nargs="+", default=["published", "sixteen", "eight", "default"])
    parser.add_argument("--policies", nargs="+", default=["top_k:0.1", "threshold:5e-4"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--set", nargs="+", default=[], metavar="KERNEL.GROUP.NAME=VALUE")
    parser.add_argument("--sweep", action="store_true", help="try launch settings of every kernel")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for text in args.set:
        override(text)
    dtype, policies = getattr(torch, args.dtype), [parse(text) for text in args.policies]
    cases = {c.name: c for c in CASES}
    wanted = [cases[f"{gate}-{tokens // 1024}k"] for tokens in args.tokens for gate in args.gates]
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for case in wanted:
            if args.sweep:
                sweep(case, policies[0], dtype, max(5, args.repeats // 5))
            else:
                rows += measure(case, policies, dtype, args.repeats)
            torch.cuda.empty_cache()
    if args.out and rows:
        report = {
            "versions": versions(),
            "device": torch.cuda.get_device_name(),
            "date": datetime.now(UTC).date().isoformat(),
            "dtype": args.dtype,
            "set": args.set,
            "rows": rows,
        }
        with staged(args.out.parent) as folder:
            (folder / args.out.name).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
