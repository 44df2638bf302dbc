"""How a benchmark shows that it runs: a bar per stage on a terminal, else a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from seerattention.files import read_json


class ProgressReporter:
    """A `seerattention.bench.plan.Reporter` of lines on a console and an open bar."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self.console, self.progress = console, progress
        self.task = progress.add_task("", total=None)

    def stage(self, what: str, steps: int) -> None:
        """Begin a part of the run."""
        self.progress.reset(self.task, total=steps, description=what, said="")
        if not self.console.is_terminal:
            self.console.print(f"  {what}")

    def step(self, name: str) -> None:
        """Count one step."""
        self.progress.update(self.task, advance=1, said=name)

    def note(self, text: str) -> None:
        """Print what the reader must know."""
        self.console.print(f"  {text}", style="yellow", markup=False)


@contextmanager
def result_of(path: Path, command: str) -> Iterator[dict[str, Any]]:
    """Read a result; what it is used for says what it lacks.

    Raises:
        ValueError: If it is none of the command's, or has not what is asked of it.
    """
    content = read_json(path)
    try:
        yield content
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of {command} ({type(error).__name__}: {error})") from error
