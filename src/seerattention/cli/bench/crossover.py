"""``seerattention bench crossover``: from which length and up to which density sparse attention is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from seerattention.cli._show import bar, console_of, formatted
from seerattention.cli.bench._reporter import ProgressReporter, result_of
from seerattention.files import check_writable, write_json

#: Columns of the tables, and how a row's values are written.
COLUMNS = {
    "tokens": "{tokens:,}",
    "dense": "{dense}",
    "dense ms": "{dense_ms:.3f}",
    "selection ms": "{selection_ms:.3f}",
    "sparse faster up to density": "{densest:.0%}",
}
STEPS = {
    "cached tokens": "{tokens:,}",
    "dense": "{dense}",
    "dense ms": "{dense_ms:.4f}",
    "sparse step ms": "{step_ms:.4f}",
}
PHASES = ("prefill", "decode")


def run(
    out: Annotated[
        Path, typer.Option(help="Table, JSON; this device's entry is replaced, others stay.")
    ] = Path("runs/crossover.json"),
    report: Annotated[
        Path | None,
        typer.Option(
            help="A result of bench prefill or bench decode to derive it from; default: measure now."
        ),
    ] = None,
    phase: Annotated[
        str, typer.Option(help="prefill, decode or both: what to measure; the other stays as it is.")
    ] = "both",
    tokens: Annotated[list[int] | None, typer.Option(help="Sequence length; repeatable.")] = None,
    gate: Annotated[
        str, typer.Option(help="published, sub16, sub8, default or 8-bits: what selects in prefill.")
    ] = "default",
    decode_gate: Annotated[
        str,
        typer.Option(
            help="default, sub<n> (n keys per summary) or quest: whose choosing counts in decoding."
        ),
    ] = "default",
    block: Annotated[int, typer.Option(help="Tokens per block.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds; the variants take turns.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; default the GPU if any.")] = "",
) -> None:
    """Derive where dense attention is faster than selecting blocks and reading few, and print it.

    What attach uses by default is src/seerattention/data/crossover.json.
    """
    import torch

    from seerattention.bench.crossover import decode_of, entry_of, extended, merged
    from seerattention.crossover import read_table

    if phase not in (*PHASES, "both"):
        raise ValueError(f"phase must be prefill, decode or both, got {phase!r}")
    console = console_of()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_writable(out)
    known = read_table(out)

    def derived(measured: dict[str, Any]) -> dict[str, Any]:
        return entry_of(measured, gate, block) if "layers" in measured else decode_of(measured, decode_gate)

    if report is not None:
        with result_of(report, "bench prefill or bench decode") as measured:
            entry = extended(known, derived(measured))
    else:
        entry = {}
        with bar(console) as progress:
            reporter = ProgressReporter(console, progress)
            for one in PHASES if phase == "both" else (phase,):
                measured = _measured(one, reporter, tokens, gate, decode_gate, block, repeats, device)
                entry |= derived(measured)
        entry = extended(known, entry)
    write_json(out, merged(known, entry))
    console.print(formatted(COLUMNS, entry["rows"]))
    cudnn = f"; cuDNN from {entry['cudnn_from']:,} tokens" if entry["cudnn_from"] else ""
    console.print(
        f"{entry['device']}, {entry['backend']}, {entry['gate']} gate: dense below "
        f"{entry['dense_below']:,} tokens{cudnn}; {out} has these numbers"
    )
    if "decode_rows" in entry:
        console.print(formatted(STEPS, entry["decode_rows"]))
        console.print(
            f"{entry['decode_gate']} gate: decoding is dense below {entry['decode_dense_below']:,} cached "
            "tokens"
        )


def _measured(
    phase: str,
    reporter: ProgressReporter,
    tokens: list[int] | None,
    gate: str,
    decode_gate: str,
    block: int,
    repeats: int,
    device: str,
) -> dict[str, Any]:
    """Measure what a phase's part of an entry is derived from."""
    from seerattention.bench import decode, prefill
    from seerattention.bench.crossover import WORTHWHILE
    from seerattention.bench.plan import DECODE_DEFAULTS, DEFAULTS, DecodePlan, Plan

    cpu = device == "cpu"
    common: dict[str, Any] = {"peers": ("cudnn", "fa2"), "device": device, "repeats": repeats}
    if phase == "decode":
        lengths = tokens or [1024 << i for i in range(6 if cpu else 8)]
        settings = DECODE_DEFAULTS.get(device, DECODE_DEFAULTS["cpu"]) | common
        settings |= {"sizes": tuple((1, n) for n in lengths), "gates": (decode_gate,), "pages": ()}
        *_, measured = decode.measure(DecodePlan(**settings, density=WORTHWHILE, block=block), reporter)
        return measured
    lengths = tokens or ([512, 1024, 2048, 4096, 8192] if cpu else [1024 << i for i in range(6)])
    settings = DEFAULTS.get(device, DEFAULTS["cpu"]) | common
    settings |= {"tokens": tuple(lengths), "densities": (WORTHWHILE, 0.3, 0.6, 1.0), "blocks": (block,)}
    settings |= {"masks": ("random",), "gates": (gate,)}
    *_, measured = prefill.measure(Plan(**settings), reporter)
    return measured
