"""How a benchmark shows that it runs: a bar per stage on a terminal, else a line."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressReporter:
    """A `seerattention.bench.prefill.Reporter` on a console; a context that ends the bar.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[name]}"),
        )
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("", name="", total=None)

    def __enter__(self) -> ProgressReporter:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def stage(self, what: str, steps: int) -> None:
        """Begin a part of the run."""
        self.progress.reset(self.task, total=steps, description=what, name="")
        if not self.console.is_terminal:
            self.console.print(f"  {what}", highlight=False)

    def step(self, name: str) -> None:
        """Count one step."""
        self.progress.update(self.task, advance=1, name=name)

    def note(self, text: str) -> None:
        """Print what the reader must know."""
        self.console.print(f"  {text}", style="yellow", highlight=False, markup=False)
