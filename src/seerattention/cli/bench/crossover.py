"""``seerattention bench crossover``: from which length and up to which density sparse prefill is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seerattention.cli._show import bar, console_of, formatted
from seerattention.cli.bench._reporter import ProgressReporter, result_of_prefill
from seerattention.files import check_writable, write_json

#: Columns of the table, and how a row's values are written.
COLUMNS = {
    "tokens": "{tokens:,}",
    "dense": "{dense}",
    "dense ms": "{dense_ms:.3f}",
    "selection ms": "{selection_ms:.3f}",
    "sparse faster up to density": "{densest:.0%}",
}


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
    """Derive where dense attention is faster than selecting blocks and reading few, and print it.

    What attach uses by default is src/seerattention/data/crossover.json.
    """
    import torch

    from seerattention.bench.crossover import WORTHWHILE, entry_of, merged
    from seerattention.bench.plan import DEFAULTS, Plan
    from seerattention.bench.prefill import measure
    from seerattention.crossover import read_table

    console = console_of()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lengths = tokens or ([512, 1024, 2048, 4096, 8192] if device == "cpu" else [1024 << i for i in range(6)])
    check_writable(out)
    known = read_table(out)
    if report is not None:
        with result_of_prefill(report) as measured:
            entry = entry_of(measured, gate, block)
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
        with bar(console) as progress:
            *_, measured = measure(plan, ProgressReporter(console, progress))
        entry = entry_of(measured, gate, block)
    write_json(out, merged(known, entry))
    console.print(formatted(COLUMNS, entry["rows"]))
    cudnn = f"; cuDNN from {entry['cudnn_from']:,} tokens" if entry["cudnn_from"] else ""
    console.print(
        f"{entry['device']}, {entry['backend']}, {entry['gate']} gate: dense below "
        f"{entry['dense_below']:,} tokens{cudnn}; {out} has these numbers"
    )
