"""The command line: one file per command, found by its name.

Each defines ``run``, whose signature and docstring are the command's options and help. Files here import
what is heavy inside ``run``, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

#: Errors that a person can do something about: they end in one sentence and exit code 2.
EXPECTED = (ValueError, NotImplementedError, FloatingPointError, OSError, ModuleNotFoundError)


def commands() -> list[str]:
    """Return the names of all commands."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except EXPECTED as error:
            text = str(error) or type(error).__name__
            Console(stderr=True).print(f"error: {text}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            Console(stderr=True).print("stopped", style="red")
            raise typer.Exit(130) from None

    return guarded


def app() -> typer.Typer:
    """Return the application with every command in this folder."""
    built = typer.Typer(
        name="seerattention",
        help="Learned block-sparse attention for long prompts.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name in commands():
        module = importlib.import_module(f"{__name__}.{name}")
        built.command(name)(_guarded(module.run))
    # A group even with one command, so that the command is always named.
    built.callback()(lambda: None)
    return built


def main() -> None:
    """Entry point of the ``seerattention`` script."""
    sys.exit(app()())
