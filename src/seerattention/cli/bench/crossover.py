"""``seerattention bench crossover``: from which length and up to which density sparse prefill is faster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def run(
    out: Annotated[
        Path, typer.Option(help="Table, JSON; this device's entry is replaced, others stay.")
    ] = Path("runs/crossover.json"),
    report: Annotated[
        Path | None, typer.Option(help="A result of bench prefill to derive it from; default: measure now.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Sequence length; repeatable.")] = None,
    gate: Annotated[
        str, typer.Option(help="published, sub16, sub8 or default: whose selection counts.")
    ] = "default",
    block: Annotated[int, typer.Option(help="Tokens per block.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds; the variants take turns.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; default the GPU if any.")] = "",
) -> None:
    """Derive where dense attention is faster than choosing blocks and reading few, and print it.

    What attach uses by default is src/seerattention/data/crossover.json.
    """
    import torch
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from seerattention.bench.crossover import WORTHWHILE, entry_of, merged
    from seerattention.bench.plan import DEFAULTS, Plan
    from seerattention.bench.prefill import measure
    from seerattention.cli.bench._reporter import ProgressReporter
    from seerattention.crossover import read_table
    from seerattention.files import staged

    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lengths = tokens or ([512, 1024, 2048, 4096, 8192] if device == "cpu" else [1024 << i for i in range(6)])
    with staged(out.parent) as folder:
        if report is not None:
            measured: dict[str, Any] = json.loads(report.read_text())
        else:
            settings = {
                **DEFAULTS.get(device, DEFAULTS["cpu"]),
                "tokens": tuple(lengths),
                "densities": (WORTHWHILE, 0.3, 0.6, 1.0),
                "blocks": (block,),
                "masks": ("random",),
                "gates": (gate,),
            }
            plan = Plan(**settings, peers=("cudnn", "fa2"), device=device, repeats=repeats)
            with ProgressReporter(console) as reporter:
                *_, measured = measure(plan, reporter)
        entry = entry_of(measured, gate, block)
        table = merged(read_table(out), entry)
        (folder / out.name).write_text(json.dumps(table, indent=2) + "\n")
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title in ("tokens", "dense", "dense ms", "selection ms", "sparse faster up to density"):
        shown.add_column(title, justify="right")
    for row in entry["rows"]:
        shown.add_row(
            f"{row['tokens']:,}",
            row["dense"],
            f"{row['dense_ms']:.3f}",
            f"{row['selection_ms']:.3f}",
            f"{row['densest']:.0%}",
        )
    console.print(shown)
    cudnn = f"; cuDNN from {entry['cudnn_from']:,} tokens" if entry["cudnn_from"] else ""
    console.print(
        f"{entry['device']}, {entry['backend']}, {entry['gate']} gate: dense below "
        f"{entry['dense_below']:,} tokens{cudnn}; {out} has these numbers",
        highlight=False,
    )
