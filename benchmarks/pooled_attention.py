"""Time attention with its pooled map on a GPU, beside dense attention in the same run.

python benchmarks/pooled_attention.py --out benchmarks/results/<device>/pooled_attention.json
python benchmarks/pooled_attention.py --tokens 32768 --set launch.block_n=128 launch.stages=2
python benchmarks/pooled_attention.py --tokens 32768 --sweep
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from script import kernel_parser, launches, override, sweep, times, write
from torch import Tensor

from seerattention.bench import peers
from seerattention.measure.timing import interleaved, peak_mb
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


def variants(q: Tensor, k: Tensor, v: Tensor, block: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    hopper = BACKENDS["hopper"].unsupported(q, k, v, (block, block), PoolOptions.of(q, k))
    fastest = {} if hopper else {
        f"output and map {block} x {block}, hopper": lambda: pooled_attention(
            q, k, v, (block, block), backend="hopper"
        ),
    }  # fmt: skip
    return fastest | {
        "dense cudnn": lambda: peers.dense(peers.DENSE["cudnn"], q, k, v),
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
        f"output and map of mass {block} x {block}": lambda: pooled_attention(
            q, k, v, (block, block), pool="mass", backend="triton"
        ),
        f"map of mass {block} x {block} alone": lambda: pooled_map(
            q, k, (block, block), pool="mass", backend="triton"
        ),
    }


def measure(shape: Shape, block: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Time every variant on one shape."""
    q, k, v = random_qkv(shape, dtype=dtype, device="cuda")
    timed = variants(q, k, v, block)
    memory = {name: peak_mb(run, result=False) for name, run in timed.items()}
    seconds = interleaved(timed, repeats=repeats, device="cuda")
    base = median(seconds["dense cudnn"])
    flops = 4 * shape.batch * shape.heads * shape.head_dim * shape.queries * shape.keys / 2
    rows = []
    for name, found in seconds.items():
        row = {
            "tokens": shape.keys,
            "variant": name,
            **times(found),
            "tflops": round(flops / median(found) / 1e12, 1),
            "times_dense": round(median(found) / base, 3),
            "extra_mb": round(memory[name], 1),
        }
        rows.append(row)
        low, high = row["range_ms"]
        took = f"{row['ms']:9.3f} ms ({low:.3f}-{high:.3f})  {row['tflops']:6.1f} TFLOP/s"
        shares = f"{row['times_dense']:5.2f}x dense  extra {row['extra_mb']:7.1f} MB"
        print(f"{shape.keys:7} {name:42} {took}  {shares}", flush=True)
    return rows


def main() -> None:
    """Measure the lengths asked for."""
    parser = kernel_parser(__doc__, [8192, 32768, 131072])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("HQ", "HK"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    args = parser.parse_args()
    dtype, block = getattr(torch, args.dtype), (args.block, args.block)
    places = {"launch": [(kernel.LAUNCHES, (dtype.itemsize, max(64, 1 << (args.head_dim - 1).bit_length())))]}
    override(places, args.set)
    about = {"dtype": args.dtype, "heads": args.heads, "head_dim": args.head_dim, "set": args.set}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for tokens in args.tokens:
            shape = Shape(
                name="", heads=args.heads[0], kv_heads=args.heads[1], queries=tokens, keys=tokens,
                head_dim=args.head_dim,
            )  # fmt: skip
            if args.sweep:
                q, k, v = random_qkv(shape, dtype=dtype, device="cuda")
                run = partial(pooled_attention, q, k, v, block, backend="triton")
                sweep(f"{tokens:7}", places["launch"], SWEEP, run)
            else:
                rows += measure(shape, args.block, dtype, args.repeats)
            torch.cuda.empty_cache()
            # Long ones come last: what is stopped there keeps what it has.
            write(args.out, rows, **about, **launches({"launches": kernel.LAUNCHES}))


if __name__ == "__main__":
    main()
