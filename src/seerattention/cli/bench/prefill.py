"""``seerattention bench prefill``: prefill attention, its parts and its peers, as JSON, table and picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from seerattention.cli._show import bar, console_of, formatted
from seerattention.cli.bench._reporter import ProgressReporter
from seerattention.files import check_writable, write_json, write_whole

#: Columns of the tables, and how a row's values are written.
ATTENTION = {
    "tokens": "{tokens:,}",
    "block": "{block}",
    "mask": "{mask}",
    "backend": "{backend}",
    "density": "{density:.1%}",
    "ms": "{ms:.4g}",
    "range": "{range_ms[0]:.4g}-{range_ms[1]:.4g}",
    "TFLOP/s": "{tflops:.3g}",
    "matmul": "{share_of_matmul:.0%}",
    "speedup": "{speedup:.2f}x",
}
LAYERS = {
    "tokens": "{tokens:,}",
    "block": "{block}",
    "gate": "{gate}",
    "density": "{density:.1%}",
    "selection ms": "{selection_ms:.4g}",
    "attention ms": "{attention_ms:.4g}",
    "total ms": "{total_ms:.4g}",
    "speedup": "{speedup:.2f}x",
    "extra MB": "{memory_mb}",
}


def run(
    out: Annotated[Path, typer.Option(help="File for the results, JSON.")] = Path("runs/prefill.json"),
    figure: Annotated[
        Path | None, typer.Option(help="Picture; default beside the results where matplotlib is installed.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Sequence length; repeatable.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Share of blocks read; repeatable.")] = None,
    block: Annotated[list[int] | None, typer.Option(help="Tokens per block; repeatable.")] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="random, group (random, a list per KV head), gate (the bundled gates') or band; repeatable."
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="Gate whose selection is timed: published, sub16, sub8, default, 8-bits, none; repeatable."
        ),
    ] = None,
    page: Annotated[
        list[int] | None, typer.Option(help="Tokens per page, to time keys in pages, too; repeatable.")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="Of cudnn, fa2, fa4 and flex on a GPU; dense ones give the speedups.")
    ] = "cudnn,fa2,flex",
    peer: Annotated[
        list[str] | None,
        typer.Option(help="A further peer, module:function(q, k, v, selection); repeatable."),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Dimension of a head.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds; the variants take turns.")] = 5,
    teacher_tokens: Annotated[int, typer.Option(help="Length of the text behind the gate masks.")] = 8192,
    device: Annotated[str, typer.Option(help="cpu or cuda; default the GPU if any.")] = "",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Time prefill attention against dense kernels and peers in one run, every output checked first.

    Defaults are the shape of Llama 3.1 8B on a GPU and that of the bundled model on a CPU.
    """
    import torch

    from seerattention.bench.plan import DEFAULTS, Plan
    from seerattention.bench.prefill import measure
    from seerattention.bench.roofline import draw_roofline
    from seerattention.measure.plot import require_matplotlib

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given: dict[str, Any] = {
        "tokens": tokens,
        "densities": density,
        "blocks": block,
        "masks": mask,
        "gates": [] if gate == ["none"] else gate,
        "pages": page,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
    }
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    plan = Plan(
        **{**DEFAULTS.get(device, DEFAULTS["cpu"]), **given},
        peers=tuple(filter(None, peers.split(","))),
        extra=tuple(peer or ()),
        device=device,
        repeats=repeats,
        teacher_tokens=teacher_tokens,
    )
    if figure is not None:
        require_matplotlib(figure)
    console = console_of()
    report: dict[str, Any] = {}
    check_writable(out)
    with bar(console) as progress:
        for report in measure(plan, ProgressReporter(console, progress)):
            # Long lengths come last: what is stopped there keeps what it has.
            write_json(out, report)
    _show(report, console)
    console.print(f"{out} has these numbers")
    if figure is None and importlib.util.find_spec("matplotlib") is None:
        console.print(f"no picture without matplotlib; seerattention bench roofline {out} draws it elsewhere")
        return
    figure = figure or out.with_suffix(".png")
    write_whole(figure, lambda path: draw_roofline(report, path))
    console.print(f"{figure} is its picture")


def _show(report: dict[str, Any], console: Console) -> None:
    """Print the ceilings and the tables of a report."""
    limits = report["ceilings"]
    l2 = f", reads from L2 {limits['l2_tbs']:.1f} TB/s" if limits["l2_tbs"] else ""
    size = limits["matmul_size"]
    console.print(
        f"{report['versions']['device']}: matrix product of {size} x {size} x {size} in {report['dtype']} "
        f"{limits['matmul_tflops']:.3f} TFLOP/s, copy {limits['copy_tbs']:.3f} TB/s{l2}"
    )
    rows = [row | {"block": row["block"] or ""} for row in report["rows"]]
    console.print(formatted(ATTENTION, rows))
    if report["layers"]:
        rows = [row | {"memory_mb": row["memory_mb"] or ""} for row in report["layers"]]
        console.print(formatted(LAYERS, rows))
