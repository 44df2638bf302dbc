"""Time attention with its pooled map on a GPU, beside dense attention in the same run.

python benchmarks/pooled_attention.py --out benchmarks/results/<device>/pooled_attention.json
python benchmarks/pooled_attention.py --tokens 32768 --set block_n=128 stages=2
python benchmarks/pooled_attention.py --tokens 32768 --sweep
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seerattention.files import staged
from seerattention.measure.timing import interleaved
from seerattention.measure.versions import versions
from seerattention.ops.launch import Launch
from seerattention.ops.options import PoolOptions
from seerattention.ops.pooled_attention import BACKENDS, pooled_attention, pooled_map
from seerattention.ops.pooled_attention import triton as kernel
from seerattention.ops.shapes import Shape
from seerattention.testing.inputs import random_qkv

#: Tried by ``--sweep``. Each takes seconds to compile; registers and shared memory: docs/kernels.md.
SWEEP = [
    *(Launch(128, 64, 8, stages, 1, direct=direct) for stages in (2, 3, 4) for direct in (False, True)),
    *(Launch(128, 128, 8, 2, 1, direct=direct) for direct in (False, True)),
    *(Launch(64, 64, 4, stages, 2, direct=direct) for stages in (2, 3) for direct in (False, True)),
]


def extra_mb(run: Callable[[], object]) -> float:
    """Peak memory beyond what is there before and what the call returns, in MB."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    kept = torch.cuda.memory_allocated()
    peak = torch.cuda.max_memory_allocated()
    del result
    # What is returned exists at the peak already.
    return (peak - max(kept, before)) / 1e6


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


def variants(q: Tensor, k: Tensor, v: Tensor, block: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    hopper = BACKENDS["hopper"].unsupported(q, k, v, (block, block), PoolOptions.of(q, k))
    fastest = {} if hopper else {
        f"output and map {block} x {block}, hopper": lambda: pooled_attention(
            q, k, v, (block, block), backend="hopper"
        ),
    }  # fmt: skip
    return fastest | {
        "dense cudnn": lambda: dense(q, k, v),
        f"output and map {block} x {block}": lambda: pooled_attention(
            q, k, v, (block, block), backend="triton"
        ),
        f"map {block} x {block} alone": lambda: pooled_map(q, k, (block, block), backend="triton"),
        f"output and map per KV head {block} x {block}": lambda: pooled_attention(
            q, k, v, (block, block), per_kv_head=True, backend="triton"
        ),
        f"output and map per KV head 1 x {block}": lambda: pooled_attention(
            q, k, v, (1, block), per_kv_head=True, backend="triton"
        ),
    }


def measure(shape: Shape, block: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Time every variant on one shape."""
    q, k, v = random_qkv(shape, dtype=dtype, device="cuda")
    timed = variants(q, k, v, block)
    memory = {name: extra_mb(run) for name, run in timed.items()}
    seconds = interleaved(timed, repeats=repeats, device="cuda")
    base = median(seconds["dense cudnn"])
    flops = 4 * shape.batch * shape.heads * shape.head_dim * shape.queries * shape.keys / 2
    rows = []
    for name, times in seconds.items():
        row = {
            "tokens": shape.keys,
            "variant": name,
            "ms": round(median(times) * 1e3, 3),
            "range_ms": [round(min(times) * 1e3, 3), round(max(times) * 1e3, 3)],
            "tflops": round(flops / median(times) / 1e12, 1),
            "times_dense": round(median(times) / base, 3),
            "extra_mb": round(memory[name], 1),
        }
        rows.append(row)
        low, high = row["range_ms"]
        times = f"{row['ms']:9.3f} ms ({low:.3f}-{high:.3f})  {row['tflops']:6.1f} TFLOP/s"
        shares = f"{row['times_dense']:5.2f}x dense  extra {row['extra_mb']:7.1f} MB"
        print(f"{shape.keys:7} {name:42} {times}  {shares}", flush=True)
    return rows


def sweep(shape: Shape, block: int, dtype: torch.dtype, rounds: int) -> None:
    """Print the times of both maps under many launches, the best first, as shares of dense attention."""
    q, k, v = random_qkv(shape, dtype=dtype, device="cuda")
    key = dtype.itemsize, max(64, 1 << (shape.head_dim - 1).bit_length())
    timed: dict[str, Callable[[], object]] = {"dense cudnn": lambda: dense(q, k, v)}

    def under(launch: Launch) -> Callable[[], object]:
        def run() -> object:
            kernel.LAUNCHES[key] = launch
            return pooled_attention(q, k, v, (block, block), backend="triton")

        return run

    before = kernel.LAUNCHES[key]
    for launch in SWEEP:
        try:
            under(launch)()
            torch.cuda.synchronize()
        except Exception as error:  # too much shared memory: another type in every version of Triton
            print(f"{launch}: {type(error).__name__}", flush=True)
            continue
        timed[str(launch)] = under(launch)
    seconds = interleaved(timed, repeats=rounds, warmup=1, device="cuda")
    kernel.LAUNCHES[key] = before
    base = median(seconds["dense cudnn"])
    for name, times in sorted(seconds.items(), key=lambda item: median(item[1])):
        print(
            f"{shape.keys:7} {median(times) * 1e3:9.3f} ms {median(times) / base:5.2f}x dense  {name}",
            flush=True,
        )


def override(shape: Shape, dtype: torch.dtype, settings: list[str]) -> None:
    """Change the launch that a shape gets, e.g. ``block_n=128``."""
    key = dtype.itemsize, max(64, 1 << (shape.head_dim - 1).bit_length())
    known = asdict(kernel.LAUNCHES[key])
    for text in settings:
        name, _, value = text.partition("=")
        if name not in known:
            raise ValueError(f"{text!r} names no setting; there are {sorted(known)}")
        kernel.LAUNCHES[key] = replace(kernel.LAUNCHES[key], **{name: type(known[name])(int(value))})


def main() -> None:
    """Measure the lengths asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("HQ", "HK"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--sweep", action="store_true", help="try launches at every length instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for tokens in args.tokens:
            shape = Shape(
                name="", heads=args.heads[0], kv_heads=args.heads[1], queries=tokens, keys=tokens,
                head_dim=args.head_dim,
            )  # fmt: skip
            override(shape, dtype, args.set)
            if args.sweep:
                sweep(shape, args.block, dtype, 3)
            else:
                rows += measure(shape, args.block, dtype, args.repeats)
            torch.cuda.empty_cache()
    if args.out and rows:
        report = {
            "versions": versions(),
            "device": torch.cuda.get_device_name(),
            "date": datetime.now(UTC).date().isoformat(),
            "dtype": args.dtype,
            "heads": args.heads,
            "head_dim": args.head_dim,
            "set": args.set,
            "launches": {str(key): asdict(launch) for key, launch in kernel.LAUNCHES.items()},
            "rows": rows,
        }
        with staged(args.out.parent) as folder:
            (folder / args.out.name).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
