"""How commands show what they do: tables, bars, and lines in place of bars without a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from seerattention.hosts.transformers import Gates
    from seerattention.train.loop import Loop

#: Without a terminal, training prints this many lines.
LINES = 12


def console_of(width: int = 120, *, quiet: bool = False) -> Console:
    """Return where a command prints; what is no terminal is so many columns wide."""
    # Names of files and models may hold brackets.
    made = Console(quiet=quiet, highlight=False, markup=False)
    if not made.is_terminal:
        made.width = width
    return made


def about_gates(gates: Gates) -> list[str]:
    """Return lines on gates: what they choose for and in which model, their shapes, their policies."""
    c, parameters = gates.config, list(gates.parameters())
    first = next(gate for _, gate in gates.items())
    policies = {"prefill": gates.policy, "decode": gates.decode_policy}
    told = [policies[phase] or "none saved; give attach one" for phase in c.phases]
    return [
        f"gates       {c.phase}, one score per {'KV' if c.per_kv_head else 'query'} head, "
        f"for {gates.base.name or 'an unnamed model'}",
        f"layers      {len(gates.layers)}, of {c.num_heads} query and {c.num_kv_heads} KV heads of "
        f"{c.head_dim}; blocks of {c.block_size} tokens",
        f"per layer   {', '.join(f'{n} {list(v.shape)}' for n, v in first.state_dict().items())}",
        f"size        {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {parameters[0].dtype}",
        f"policy      {'; decoding: '.join(told)}",
        *([f"taught      for positions up to {gates.reach:,}"] if gates.reach else []),
    ]


def table(
    titles: Sequence[str], rows: Iterable[Sequence[str | Text]], title: str = "", *, words: bool = False
) -> Table:
    """Return a table; its first column is words, the others are numbers, or all are words that wrap.

    Where there is little room the titles of numbers wrap, and no number is cut.
    """
    rows = list(rows)
    made = Table(box=SIMPLE_HEAD, padding=(0, 1), title=title or None, title_justify="left")
    for i, name in enumerate(titles):
        least = None if words else max((len(row[i]) for row in rows), default=0)
        made.add_column(name, justify="right" if i and not words else "left", min_width=least)
    for row in rows:
        made.add_row(*row)
    return made


def formatted(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], title: str = "") -> Table:
    """Return a table of rows of named values; ``columns`` has each one's title and format string."""
    cells = ([form.format_map(row) for form in columns.values()] for row in rows)
    return table(list(columns), cells, title)


class _Said(ProgressColumn):
    """What a task says beside its bar, as the field ``said``."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("said", ""))


def bar(console: Console) -> Progress:
    """Return what shows the bars of tasks while it is open; nothing without a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Said(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: ``90 s``, ``12 min``, ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def train(trainer: Loop, console: Console, doing: str = "distilling", after: int = 0) -> list[Any]:
    """Run a training to its end with a bar of its losses, recall and time left; return its steps.

    ``after`` are the tokens that its report will read.
    """
    total = trainer.config.steps
    every = max(1, total // LINES)
    steps = []
    with bar(console) as progress:
        task = progress.add_task(doing, total=total, completed=trainer.done)
        for step in trainer.run():
            steps.append(step)
            if len(steps) == 1:
                left = trainer.seconds_left(step.tokens, step.seconds, after)
                what = doing + " and the report" * bool(after)
                console.print(
                    f"time        {step.seconds:.2f} s for the first step, about {duration(left)} left "
                    f"for {what}"
                )
            said = _said(step)
            progress.update(task, completed=step.step, said=said)
            if not console.is_terminal and (step.step % every == 0 or step.step in (1, total)):
                console.print(f"  step {step.step}/{total}  {said}  {step.seconds:.2f} s/step")
    return steps


def _said(step: Any) -> str:
    """Return a step's measurements, those that it has."""
    forms = {"loss": "loss {:.4f}", "gate_loss": "gates {:.4f}", "recall": "recall {:.3f}"}
    forms["decode_recall"] = "decoding {:.3f}"
    forms["density"] = "density {:.0%}"
    values = ((form, getattr(step, name, None)) for name, form in forms.items())
    return "  ".join(form.format(value) for form, value in values if value is not None)
