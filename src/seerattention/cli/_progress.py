"""The progress bar of training, shared by ``distill``, ``finetune`` and ``demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from seerattention.train.loop import Loop

#: Without a terminal a line is printed this many times in a run, and no bar.
LINES = 12


def show(trainer: Loop, console: Console, doing: str = "distilling") -> list[Any]:
    """Run a training to its end with a bar of its losses, recall and time left; return its steps."""
    total = trainer.config.steps
    every = max(1, total // LINES)
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    steps = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=trainer.done, said="")
        for step in trainer.run():
            steps.append(step)
            if len(steps) == 1:
                left = (total - step.step) * step.seconds
                console.print(
                    f"time        {step.seconds:.2f} s for the first step, about {left / 3600:.2f} h left"
                )
            said = _said(step)
            progress.update(task, completed=step.step, said=said)
            if not console.is_terminal and (step.step % every == 0 or step.step in (1, total)):
                console.print(f"  step {step.step}/{total}  {said}  {step.seconds:.2f} s/step")
    return steps


def _said(step: Any) -> str:
    """Return a step's measurements, those that it has."""
    kinds = (("loss", "loss", ".4f"), ("gate_loss", "gates", ".4f"), ("recall", "recall", ".3f"))
    values = [
        (what, getattr(step, name, None), form)
        for name, what, form in (*kinds, ("density", "density", ".0%"))
    ]
    return "  ".join(f"{what} {value:{form}}" for what, value, form in values if value is not None)
