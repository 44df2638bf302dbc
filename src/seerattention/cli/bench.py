"""``seerattention bench``: prefill attention, dense beside every sparse backend, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from seerattention.ops._shapes import Shape


def run(
    out: Annotated[Path, typer.Option(help="File for the results, JSON.")] = Path("runs/bench.json"),
    tokens: Annotated[list[int] | None, typer.Option(help="Sequence length; repeatable.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Share of blocks read; repeatable.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 6,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Dimension of a head.")] = 64,
    block: Annotated[int, typer.Option(help="Tokens per block.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds; the variants take turns.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Time block-sparse prefill attention against dense SDPA, random blocks per head, batch 1."""
    from datetime import UTC, datetime

    import torch
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from seerattention.evals.versions import versions
    from seerattention.files import staged
    from seerattention.ops._shapes import Shape

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    console = Console()
    kind = getattr(torch, dtype)
    with staged(out.parent) as folder:
        rate = _ceiling(device, kind)
        rows: list[dict[str, Any]] = []
        for length in tokens or [4096, 8192, 16384]:
            shape = Shape(
                name=f"{length}",
                heads=heads,
                kv_heads=kv_heads,
                queries=length,
                keys=length,
                head_dim=head_dim,
                block_size=(block, block),
            )
            rows += _measure(shape, density or [0.2, 0.1, 0.05], repeats, device, kind)
        for row in rows:
            row["share_of_matmul"] = round(row["tflops"] / rate, 3)
        report = {
            "versions": versions(),
            "date": datetime.now(UTC).date().isoformat(),
            "shape": {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block": block},
            "dtype": dtype,
            "matmul_tflops": round(rate, 4),
            "rows": rows,
        }
        (folder / out.name).write_text(json.dumps(report, indent=2) + "\n")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title in ("tokens", "backend", "density", "ms", "min-max ms", "TFLOP/s", "of matmul", "speedup"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["range_ms"]
        table.add_row(
            f"{row['tokens']:,}",
            row["backend"],
            f"{row['density']:.1%}",
            f"{row['ms']:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{row['tflops']:.3f}",
            f"{row['share_of_matmul']:.0%}",
            f"{row['speedup']:.2f}x",
        )
    console.print(f"matrix product of 2048 x 2048 x 2048: {rate:.3f} TFLOP/s in {dtype}", highlight=False)
    console.print(table)
    console.print(f"{out} has these numbers", highlight=False)


def _ceiling(device: str, dtype: Any) -> float:
    """Return the rate of a large matrix product on random data, in TFLOP/s."""
    from statistics import median

    import torch

    from seerattention.testing.timing import interleaved

    size = 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = interleaved({"matmul": lambda: a @ b}, repeats=7, warmup=2)["matmul"]
    return 2 * size**3 / median(seconds) / 1e12


def _measure(
    shape: Shape, densities: list[float], repeats: int, device: str, dtype: Any
) -> list[dict[str, Any]]:
    """Time dense SDPA and every backend that runs here at one length; dense first."""
    from statistics import median

    import torch
    import torch.nn.functional as F

    from seerattention.ops import block_sparse_attention as op
    from seerattention.ops.block_sparse_attention._options import Options
    from seerattention.selection import causal_blocks
    from seerattention.testing.inputs import random_qkv, random_selection
    from seerattention.testing.timing import interleaved

    length = shape.queries
    q, k, v = random_qkv(shape, dtype=dtype, device=device)
    valid = causal_blocks(length, length, shape.block_size)
    options = Options(scale=shape.head_dim**-0.5)
    variants: dict[tuple[str, float], Any] = {
        ("dense sdpa", 1.0): lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=shape.heads != shape.kv_heads
        )
    }
    for asked in densities:
        chosen = random_selection(shape, density=asked, device=device)
        for name, backend in op.BACKENDS.items():
            # The reference computes the dense map whatever the density.
            if name != "reference" and not backend.unsupported(q, k, v, chosen, options):
                variants[name, chosen.density(valid)] = lambda name=name, chosen=chosen: (
                    op.block_sparse_attention(q, k, v, chosen, backend=name)
                )
    named = {f"{name} {share}": run for (name, share), run in variants.items()}
    with torch.inference_mode():
        seconds = interleaved(named, repeats=repeats)
    # Two products of 2 * D FLOPs for every causal pair of tokens.
    dense_flops = 4 * shape.head_dim * shape.heads * length * (length + 1) / 2
    dense_ms = median(seconds["dense sdpa 1.0"]) * 1e3
    rows = []
    for (name, share), times in zip(variants, seconds.values(), strict=True):
        ms = median(times) * 1e3
        rows.append(
            {
                "tokens": length,
                "backend": name,
                "density": round(share, 4),
                "ms": round(ms, 2),
                "range_ms": [round(min(times) * 1e3, 2), round(max(times) * 1e3, 2)],
                "tflops": round(dense_flops * share / ms / 1e9, 4),
                "speedup": round(dense_ms / ms, 3),
            }
        )
    return rows
