"""What ``distill`` and ``finetune`` share: their options, plan, and report at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer
from rich.console import Console

from seerattention.cli._show import bar, console_of, duration, table
from seerattention.files import locked, write_json
from seerattention.settings import build, explained, read

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from seerattention.measure.compare import Row
    from seerattention.measure.needle import NeedleDocument
    from seerattention.policies import TopK
    from seerattention.train.recipe import Recipe, Run

R = TypeVar("R", bound="Recipe[Any]")

#: What recall is called, by phase: in the file of results, and in their table.
RECALLS = {"prefill": ("recall", "recall"), "decode": ("decode_recall", "recall in decoding")}

#: Needle documents of the report, in each wording.
NEEDLES = 10
#: Needles say nothing about gates where dense attention finds a smaller share of them.
LEAST_FOUND = 0.5

Model = Annotated[str | None, typer.Argument(help="Hub id or folder of the base model; or in the file.")]
Text = Annotated[
    list[str] | None, typer.Option(help="Training text: .txt, .jsonl, code or a folder; repeatable.")
]
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
    from seerattention.gate_config import GateConfig, design_of
    from seerattention.train.recipe import SHAPE

    gate = explained(GateConfig, "gate.", SHAPE, design_of({}))
    return [*explained(getattr(train, recipe), without=("gate",)), *gate]


def recipe(kind: type[R], config: Path | None, overrides: list[str] | None, **options: Any) -> R:
    """Return the recipe that file, settings and options make, the latter over the former."""
    given = {name: value for name, value in options.items() if value is not None and value != []}
    return build(kind, {**read(config, overrides or ()), **given})


def alone(told: Recipe[Any], out: Path, dry_run: bool) -> AbstractContextManager[None]:
    """Keep other processes than those of this training from writing to its folder."""
    from seerattention.train.processes import make_accelerator

    main = make_accelerator(told.device).is_main_process
    return locked(out) if main and not dry_run else nullcontext()


class Report(NamedTuple):
    """What is measured at the end: dense attention beside ``policies``, on held-out text.

    Needle documents are by the name of their wording. Dense attention answers all of them, the policies those
    in the wording that it answered best.
    """

    policies: list[TopK]
    short: list[str]
    windows: list[np.ndarray]
    documents: dict[str, list[NeedleDocument]]
    skipped: str
    recall: bool
    prefill: bool

    @property
    def passes(self) -> int:
        """Passes over a window or a document of its length."""
        windows = len(self.windows) * (self.recall + self.prefill * (1 + len(self.policies)))
        return windows + len(self.asked) * (len(self.documents) + len(self.policies))

    @property
    def asked(self) -> list[NeedleDocument]:
        """The needle documents in the first wording."""
        return next(iter(self.documents.values()), [])

    @property
    def tokens(self) -> int:
        """Tokens that they read."""
        return self.passes * len(self.windows[0])

    def __str__(self) -> str:
        attention = ", ".join([*["dense"] * self.prefill, *map(_name, self.policies)])
        tried = f" (dense in {len(self.documents)} wordings)" if len(self.documents) > 1 else ""
        return (
            f"{len(self.windows)} windows and {len(self.asked)} needle documents{tried}, {attention}: "
            f"{self.passes} passes of {len(self.windows[0]):,} tokens; --set report=false leaves it out"
        )


def _name(policy: TopK) -> str:
    return f"{policy.name}:{policy.density:g}"


def planned(run: Run[Any], densities: Sequence[float]) -> Report:
    """Return what the report will measure: of densities that read the same of the text, one."""
    import numpy as np

    from seerattention.measure.compare import distinct
    from seerattention.measure.needle import NeedleTask, wordings
    from seerattention.policies import TopK
    from seerattention.rows import num_blocks

    trainer, windows = run.trainer, run.text.heldout
    length, block = len(windows[0]), trainer.gates.config.block_size
    blocks = num_blocks(length, block)
    asked = (TopK(density, sink_blocks=1).short_of(blocks, block) for density in densities)
    policies, short, documents, skipped = distinct(densities, length, block), [*filter(None, asked)], {}, ""
    recall = hasattr(trainer, "heldout_recall")
    if trainer.gates.config.phase == "decode":
        skipped = "perplexity and needles: they are of sparse prefill, and these gates choose while decoding"
    elif trainer.sharded:
        skipped = "perplexity and needles: the model is sharded; measure them on one process"
    if skipped:
        return Report(policies, short, windows, documents, skipped, recall, prefill=False)
    for wording in wordings(run.tokenizer):
        try:
            task = NeedleTask(run.tokenizer, np.concatenate(windows), wording=wording)
            documents[wording.name] = [task.make(length, seed) for seed in range(NEEDLES)]
        except ValueError as error:
            # That of the first wording, the shortest.
            skipped = skipped or f"needles: {error}"
    skipped = "" if documents else skipped
    return Report(policies, short, windows, documents, skipped, recall, prefill=True)


def go(
    run: Run[Any], name: str, more: dict[str, str], out: Path, dry_run: bool, plan: Report | None
) -> Console | None:
    """Print the plan, with ``more`` lines after model, gates and text; None where that is all."""
    from seerattention.hosts.transformers.family import full_attention_layers
    from seerattention.hosts.transformers.hub import PHASES
    from seerattention.train.share import tokens_of

    trainer, base = run.trainer, run.trainer.model
    console = console_of(quiet=not trainer.accelerator.is_main_process)
    parts = trainer.memory(len(run.text.heldout[0]))
    gates, every = sum(p.numel() for p in trainer.gates.parameters()), len(full_attention_layers(base))
    serve = "" if (some := len(trainer.gates.layers)) == every else f", whose choices {every} read"
    lines = {
        "base model": f"{name}: {base.num_parameters() / 1e6:.1f} M parameters, {base.dtype}, {base.device}",
        "gates": f"{gates / 1e6:.2f} M parameters in {some} layers{serve}, blocks of "
        f"{trainer.gates.config.block_size} tokens, for {PHASES[trainer.gates.config.phase]}",
        "text": str(run.text),
        **more,
        "report": "none" if plan is None else str(plan),
        "memory": f"about {sum(parts.values()) / 2**30:.1f} GB beside the layers' activations: "
        + ", ".join(f"{what} {size / 2**30:.1f}" for what, size in parts.items()),
        "output": str(out),
    }
    for what, said in lines.items():
        console.print(f"{what:<12}{said}", markup=False)
    for why in [] if plan is None else plan.short:
        console.print(f"{'too short':<12}{why}", markup=False)
    if dry_run:
        took = trainer.time_a_step()
        tokens = tokens_of(trainer.batches(trainer.index)).size
        whole = duration(trainer.seconds_left(tokens, took, 0 if plan is None else plan.tokens))
        console.print(f"time        {took:.2f} s for one step, about {whole} in all")
        return None
    if trainer.done:
        console.print(f"continuing after step {trainer.done}")
    return console


def report(console: Console, run: Run[Any], plan: Report, folder: Path) -> list[Row]:
    """Measure the gates dense beside sparse on held-out text, print it, and keep it beside them.

    Every process must call this, one measures and writes. Returns what was measured, dense first; nothing
    where the model is sharded or the gates are for decoding alone.
    """
    from seerattention.hosts.transformers.checkpoint import RESULTS

    trainer, names = run.trainer, list(map(_name, plan.policies))
    with bar(console) as progress:
        task = progress.add_task("report", total=plan.passes)

        def step(count: int = 1) -> None:
            progress.advance(task, count)

        recall: dict[str, list[float]] = {}
        if plan.recall:
            # As many blocks of a row as the policies read at least: the text's first and the own.
            recall = trainer.heldout_recall(tuple(p.density for p in plan.policies), least=2)
            step(len(plan.windows))
        if not trainer.accelerator.is_main_process:
            return []
        rows, plan = _measure(console, run, plan, step)
    wording = next(iter(plan.documents), "")
    found: dict[str, Any] = {
        "text": str(run.text),
        "heldout_tokens": sum(map(len, plan.windows)),
        "steps": trainer.done,
        **{RECALLS[phase][0]: dict(zip(names, values, strict=True)) for phase, values in recall.items()},
        **({"skipped": plan.skipped} if plan.skipped else {}),
        **({"wording": wording} if wording else {}),
        **{row.method: row.values() for row in rows},
    }
    lines = {row.method: ["1.000"] * len(recall) for row in rows[:1]}
    for i, name in enumerate(names):
        lines[name] = [f"{values[i]:.3f}" for values in recall.values()]
    for row in rows:
        line = lines[row.method]
        line.append(f"{row.density:.1%}")
        for value, dense, form in (
            (row.perplexity, rows[0].perplexity, ".3f"), (row.needles, rows[0].needles, ".2f")
        ):  # fmt: skip
            if value is not None and dense is not None:
                line.append(f"{value:{form}}" + ("" if row is rows[0] else f" ({value - dense:+{form}})"))
    titles = ["attention", *(RECALLS[phase][1] for phase in recall)]
    titles += [*(["density", "perplexity"] if rows else []), *(["needles"] if wording else [])]
    cells = [[name, *line] for name, line in lines.items()]
    console.print(table(titles, cells, "held-out text, no dense last rows"))
    if wording:
        console.print(f"needles: {wording}", markup=False)
    for why in plan.short:
        console.print(f"too short: {why}", markup=False)
    if plan.skipped:
        console.print(f"not measured: {plan.skipped}", markup=False)
    write_json(folder / RESULTS, found)
    return rows


def _measure(
    console: Console, run: Run[Any], plan: Report, step: Callable[..., None]
) -> tuple[list[Row], Report]:
    """Return the rows, saying on the way which one is measured, and the plan with the one wording used."""
    from seerattention.measure.compare import measured

    if not plan.prefill:
        return [], plan
    model, rows = run.trainer.model, []
    model.eval()
    for policy in (None, *plan.policies):
        if policy is None:
            row = measured(model, None, windows=plan.windows, step=step)
            row, plan = _dense_needles(model, row, plan, step)
        else:
            texts: dict[str, Any] = {"windows": plan.windows, "documents": plan.asked, "step": step}
            row = measured(model, run.trainer.gates, policy, method=_name(policy), **texts)
        rows.append(row)
        if not console.is_terminal:
            console.print(f"  measured {row.method}")
    return rows, plan


def _dense_needles(
    model: PreTrainedModel, row: Row, plan: Report, step: Callable[..., None]
) -> tuple[Row, Report]:
    """Return dense attention's row with needles, and the plan with the wording that it answers best."""
    from seerattention.measure.retrieval import understood

    if not plan.documents:
        return row, plan
    wording, found = understood(model, plan.documents, step)
    if not (why := not_understood(wording, found, row.tokens)):
        return replace(row, needles=found), plan._replace(documents={wording: plan.documents[wording]})
    step(len(plan.asked) * len(plan.policies))
    return row, plan._replace(documents={}, skipped=why)


def not_understood(wording: str, found: float, tokens: int) -> str:
    """Say why needles are left out where dense attention finds at best such a share; empty if enough."""
    if found >= LEAST_FOUND:
        return ""
    return (
        f"needles: this model does not answer such questions at {tokens:,} tokens even with dense "
        f"attention (at best {found:.0%} of them, in {wording}), so that they say nothing about the gates"
    )
