"""What ``distill`` and ``finetune`` share: their options, plan, and report at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from seerattention.cli._show import console_of, duration, table
from seerattention.files import locked, write_json
from seerattention.settings import build, explained, read

if TYPE_CHECKING:
    from seerattention.measure.compare import Row
    from seerattention.train.recipe import Recipe, Run

R = TypeVar("R", bound="Recipe[Any]")

#: Needle documents of the report.
NEEDLES = 10

Model = Annotated[str | None, typer.Argument(help="Hub id or folder of the base model; or in the file.")]
Text = Annotated[list[str] | None, typer.Option(help="Training text: .txt, .jsonl or a folder; repeatable.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.")]
Length = Annotated[int | None, typer.Option(help="Tokens per sequence.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default the GPU if any.")]
Config = Annotated[
    Path | None, typer.Option(help="TOML file of settings, such as the config.toml in a run's folder.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, key=value, over those of the file; repeatable."),
]
DryRun = Annotated[bool, typer.Option(help="Print the plan, with one step timed, and stop.")]


def keys(recipe: str) -> list[tuple[str, str, str]]:
    """Return every setting of a recipe, its default and what it is, for the help."""
    from seerattention import train
    from seerattention.gate import GateConfig
    from seerattention.train.recipe import SHAPE

    return [*explained(getattr(train, recipe), without=("gate",)), *explained(GateConfig, "gate.", SHAPE)]


def recipe(kind: type[R], config: Path | None, overrides: list[str] | None, **options: Any) -> R:
    """Return the recipe that file, settings and options make, the latter over the former."""
    given = {name: value for name, value in options.items() if value is not None and value != []}
    return build(kind, {**read(config, overrides or ()), **given})


def alone(told: Recipe[Any], out: Path, dry_run: bool) -> AbstractContextManager[None]:
    """Keep other processes than those of this training from writing to its folder."""
    from seerattention.train.processes import make_accelerator

    main = make_accelerator(told.device).is_main_process
    return locked(out) if main and not dry_run else nullcontext()


def go(run: Run[Any], name: str, more: dict[str, str], out: Path, dry_run: bool) -> Console | None:
    """Print the plan, with ``more`` lines after model, gates and text; None where that is all."""
    trainer, base = run.trainer, run.trainer.model
    console = console_of(quiet=not trainer.accelerator.is_main_process)
    parts = trainer.memory(len(run.text.heldout[0]))
    gates = sum(p.numel() for p in trainer.gates.parameters())
    lines = {
        "base model": f"{name}: {base.num_parameters() / 1e6:.1f} M parameters, {base.dtype}, {base.device}",
        "gates": f"{gates / 1e6:.2f} M parameters in {len(trainer.gates.layers)} layers, blocks of "
        f"{trainer.gates.config.block_size} tokens",
        "text": str(run.text),
        **more,
        "memory": f"about {sum(parts.values()) / 2**30:.1f} GB beside the layers' activations: "
        + ", ".join(f"{what} {size / 2**30:.1f}" for what, size in parts.items()),
        "output": str(out),
    }
    for what, said in lines.items():
        console.print(f"{what:<12}{said}", markup=False)
    if dry_run:
        took = trainer.time_a_step()
        whole = duration(took * trainer.config.steps)
        console.print(f"time        {took:.2f} s for one step, about {whole} in all")
        return None
    if trainer.done:
        console.print(f"continuing after step {trainer.done}")
    return console


def report(console: Console, run: Run[Any], densities: tuple[float, ...], folder: Path) -> list[Row]:
    """Measure the gates dense beside sparse on held-out text, print it, and keep it beside them.

    Every process must call this, one measures and writes. Returns what was measured, dense first; nothing
    where the model is sharded.
    """
    from seerattention.hosts.transformers.checkpoint import RESULTS

    trainer = run.trainer
    names = [f"top_k:{density:g}" for density in densities]
    recall = getattr(trainer, "heldout_recall", lambda densities: [])(densities)
    if not trainer.accelerator.is_main_process:
        return []
    rows, skipped = _measure(run, densities)
    found: dict[str, Any] = {
        "text": str(run.text),
        "heldout_tokens": sum(map(len, run.text.heldout)),
        "steps": trainer.done,
        **({"recall": dict(zip(names, recall, strict=True))} if recall else {}),
        **({"skipped": skipped} if skipped else {}),
        **{row.method: row.values() for row in rows},
    }
    lines = {name: [f"{value:.3f}"] for name, value in zip(names, recall, strict=False)}
    for row in rows:
        line = lines.setdefault(row.method, ["1.000"] if recall and row is rows[0] else [])
        line.append(f"{row.density:.1%}")
        for value, dense, form in (
            (row.perplexity, rows[0].perplexity, ".3f"), (row.needles, rows[0].needles, ".2f")
        ):  # fmt: skip
            delta = "" if value is None or dense is None or row is rows[0] else f" ({value - dense:+{form}})"
            line.append("-" if value is None else f"{value:{form}}{delta}")
    titles = ["attention", *(["recall"] if recall else []), "density", "perplexity", "needles"]
    cells = [[name, *line] for name, line in lines.items()]
    console.print(table(titles, cells, "held-out text, no dense last rows"))
    for why in dict.fromkeys(row.short for row in rows if row.short):
        console.print(f"too short: {why}", markup=False)
    if skipped:
        console.print(f"not measured: {skipped}", markup=False)
    write_json(folder / RESULTS, found)
    return rows


def _measure(run: Run[Any], densities: tuple[float, ...]) -> tuple[list[Row], str]:
    """Return the rows, and what could not be measured and why."""
    import numpy as np

    from seerattention.measure.compare import measured
    from seerattention.measure.needle import NeedleTask
    from seerattention.policies import TopK

    model, windows, documents, skipped = run.trainer.model, run.text.heldout, [], ""
    if run.trainer.sharded:
        return [], "perplexity and needles: the model is sharded; measure them on one process"
    try:
        task = NeedleTask(run.tokenizer, np.concatenate(windows))
        documents = [task.make(len(windows[0]), seed) for seed in range(NEEDLES)]
    except ValueError as error:
        skipped = f"needles: {error}"
    model.eval()
    rows = [measured(model, None, windows=windows, documents=documents)]
    for density in densities:
        policy, name = TopK(density, sink_blocks=1), f"top_k:{density:g}"
        rows.append(
            measured(model, run.trainer.gates, policy, method=name, windows=windows, documents=documents)
        )
    return rows, skipped
