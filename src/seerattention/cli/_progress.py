"""The progress bar of a distillation, shared by ``distill`` and ``demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from seerattention.distill import Distiller, Step

#: Without a terminal a line is printed this many times in a run, and no bar.
LINES = 12


def show(trainer: Distiller, console: Console) -> list[Step]:
    """Run a distillation to its end with a bar of loss, recall and time left; return its steps."""
    total = trainer.config.steps
    every = max(1, total // LINES)
    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  recall {task.fields[recall]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    steps = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=trainer.done, loss=float("nan"), recall=0.0)
        for step in trainer.run():
            steps.append(step)
            if len(steps) == 1:
                left = (total - step.step) * step.seconds
                console.print(
                    f"time        {step.seconds:.2f} s for the first step, about {left / 3600:.2f} h left"
                )
            progress.update(task, completed=step.step, loss=step.loss, recall=step.recall)
            if not console.is_terminal and (step.step % every == 0 or step.step in (1, total)):
                console.print(
                    f"  step {step.step}/{total}  loss {step.loss:.4f}  recall {step.recall:.3f}  "
                    f"{step.seconds:.2f} s/step"
                )
    return steps
