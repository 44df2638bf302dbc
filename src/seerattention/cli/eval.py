"""``seerattention eval``: methods x densities x lengths x tasks, dense beside sparse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from seerattention.cli._show import bar, console_of, duration, table
from seerattention.cli._training import Set
from seerattention.files import check_writable

if TYPE_CHECKING:
    from seerattention.evals.harness import Cell, Evaluation
    from seerattention.evals.records import Record, RecordFile


def run(
    config: Annotated[Path, typer.Argument(help="TOML file: methods, densities, lengths, tasks.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; default the file's `out`, or runs/eval/<its name>."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; default the file's, or the GPU if there is one.")
    ] = "",
    overrides: Set = None,
    dry_run: Annotated[
        bool,
        typer.Option(help="Print the plan, the number of samples and about how long they take, and stop."),
    ] = False,
) -> None:
    """Compare methods on the same samples. Run again after a stop to continue where it was.

    The file, with its defaults; recipes/eval/ has examples:

    lengths = [4096] (tokens of prompt and answer; required), densities = [0.1] (fractions of the causally
    valid blocks), samples = 50 (per cell), seed = 0 (of the first sample), text = "bundled" (or a list of
    .txt, .jsonl and folders), policy = "top_k:{density},sink_blocks=1".

    Table model: name = "bundled" (or hub id or folder), dtype = "auto", device = "", chat = false (use the
    chat template), max_length (tokens, where scaled RoPE takes more than the configuration says).

    Tables methods.NAME: gates = "bundled" or a folder or hub id; or baseline = a baseline's name (default
    NAME); policy (without {density}: one row; "saved": that of the gates); for baselines their options, e.g.
    block_size = [64, 64]. Dense attention is always measured first.

    Tables tasks.NAME: task = a task's name (default NAME); samples and lengths of its own; skip_below = 0.0
    (share; where dense attention is below it, no other method is asked); the task's options.

    samples.jsonl gets one line per sample, summary.md and summary.json the tables.
    """
    from dataclasses import replace

    from transformers.utils import logging

    from seerattention.evals.config import read_config
    from seerattention.evals.harness import Evaluation, load_model
    from seerattention.evals.records import RecordFile
    from seerattention.evals.summary import cells, tables, write_summary

    console = console_of(160)
    settings = read_config(config, overrides or ())
    settings = replace(settings, out=out or settings.out, device=device or settings.device)
    logging.disable_progress_bar()
    for name in ("samples.jsonl", "summary.md", "summary.json"):
        check_writable(settings.out / name)
    with RecordFile(settings.out, readonly=dry_run) as file:
        evaluation = Evaluation(settings, *load_model(settings))
        _print_plan(console, evaluation, file)
        if dry_run:
            seconds = evaluation.estimate(file)
            console.print(
                f"time     about {duration(seconds)}, if every method takes as long as dense attention, "
                "timed now at the shortest length",
            )
            return
        rows: list[dict[str, Any]] = []
        try:
            _run(console, evaluation, file)
        finally:
            rows = write_summary(evaluation, file.records)
    for title, columns, part in tables(rows):
        console.print(table(columns, map(cells, part), title))
    console.print(f"samples.jsonl, summary.md and summary.json are in {settings.out}")


def _print_plan(console: Console, evaluation: Evaluation, file: RecordFile) -> None:
    config, cells = evaluation.config, evaluation.cells
    for line in file.corrupt:
        console.print(f"corrupt  {line}; its sample is made again", style="yellow", markup=False)
    total = sum(len(cell.seeds) for cell in cells)
    left = evaluation.missing(file)
    policies: dict[str, list[str]] = {}
    for method in config.methods:
        policies.setdefault(method.policy, []).append(method.label)
    densities = ", ".join(f"{d:.3g}" for d in sorted(config.densities, reverse=True))
    lines = [
        f"model    {config.model}, {evaluation.model.dtype} on {evaluation.model.device}",
        f"text     {', '.join(config.text)}: {len(evaluation.source.haystack):,} tokens",
        f"methods  {', '.join(policies.pop(''))}",
    ]
    for policy, labels in policies.items():
        at = f" at densities {densities}" if "{density}" in policy else ""
        lines.append(f"         {', '.join(labels)}: {policy}{at}")
    lines += [
        f"task     {plan.label}: {plan.samples} samples at {', '.join(f'{n:,}' for n in plan.lengths)} tokens"
        for plan in config.plans
    ]
    lines += [f"short    {why}" for why in evaluation.short()]
    there = sum((cell.of, seed) in file.records for cell in cells for seed in cell.seeds)
    lines.append(f"samples  {total:,} in {len(cells)} cells; {there:,} are there, {left:,} to be made")
    if total > there + left:
        lines.append(f"         {total - there - left:,} are not asked: dense attention cannot do them")
    if others := len(file.records) - there:
        lines.append(f"         {others:,} more in {file.path} belong to other settings and are left alone")
    console.print("\n".join(lines), markup=False)


def _run(console: Console, evaluation: Evaluation, file: RecordFile) -> None:
    """Make what is missing, with a bar; without a terminal a line per cell."""
    from seerattention.evals.summary import cells, summary_rows

    with bar(console) as progress:
        task = progress.add_task("samples", total=evaluation.missing(file))
        seen: set[str] = set()

        def done(cell: Cell, record: Record | None) -> None:
            if record is None and evaluation.skipped(cell, file):
                console.print(f"  {cell.name}: not asked, dense attention cannot do it", markup=False)
                progress.update(task, total=progress.tasks[task].completed + evaluation.missing(file))
                return
            if record is None:
                row = cells(summary_rows([cell], file.records)[0])
                console.print(f"  {cell.name}: {row[4]} ({row[5]}), {row[3]} samples", markup=False)
                return
            progress.update(task, advance=1, said=cell.name)
            for fault in set(record.faults) - seen:
                seen.add(fault)
                console.print(
                    f"  {fault}: {cell.name}, seed {record.seed}; counted in the tables",
                    style="yellow",
                    markup=False,
                )

        evaluation.run(file, done)
