"""The command line: one file per command, found by its name; a folder is a group of commands.

Each file defines ``run``, whose signature and docstring are the command's options and help; where it takes
settings too, ``keys`` returns what the end of the help says about them. Files here import what is heavy
inside these functions, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from seerattention.cli._show import console_of, table

#: Errors that a person can do something about: they end in one sentence and exit code 2.
EXPECTED = (ValueError, NotImplementedError, FloatingPointError, OSError, ImportError, MemoryError)


def commands() -> list[str]:
    """Return the names of all commands."""
    return _names(__path__)


def _names(path: Iterable[str]) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def _guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (*EXPECTED, RuntimeError) as error:
            # By its name: importing torch for it would take seconds.
            if not isinstance(error, EXPECTED) and type(error).__name__ != "OutOfMemoryError":
                raise
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
    _add(built, __name__, commands())
    return built


def _add(to: typer.Typer, package: str, names: list[str]) -> None:
    for name in names:
        module = importlib.import_module(f"{package}.{name}")
        if hasattr(module, "__path__"):
            group = typer.Typer(help=module.__doc__, no_args_is_help=True)
            _add(group, module.__name__, _names(module.__path__))
            to.add_typer(group, name=name)
        else:
            kind = _explaining(module.keys) if hasattr(module, "keys") else None
            to.command(name, cls=kind, help=_paragraphs(module.run))(_guarded(module.run))
    # A group even with one command, so that the command is always named.
    to.callback()(lambda: None)


def _paragraphs(run: Callable[..., Any]) -> str:
    """Return a docstring with one line per paragraph: the help breaks lines where the terminal ends."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(run) or "").split("\n\n"))


def _explaining(keys: Callable[[], Iterable[Sequence[str]]]) -> type[TyperCommand]:
    """Return a kind of command that knows its settings, asked for when somebody wants them."""

    class Explaining(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            options = {name for parameter in self.params for name in parameter.opts}
            for option, _, value in (arg.partition("=") for arg in args if arg.startswith("--")):
                if option in options:
                    continue
                asked = option.removeprefix("--").replace("-", "_")
                for setting in (key for key, *_ in keys() if key.rpartition(".")[2] == asked):
                    raise typer.BadParameter(
                        f"{option} is a setting, not an option; give --set {setting}={value or 'VALUE'}", ctx
                    )
            return super().parse_args(ctx, args)

        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            shown = table(("setting", "default", "what it is"), keys(), words=True)
            console_of().print("Settings, in the file of --config or by --set setting=value:", shown)

    return Explaining


def main() -> None:
    """Entry point of the ``seerattention`` script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files, and signs that a terminal cannot show, are no reason to lose a run's results.
            stream.reconfigure(errors="backslashreplace")
    sys.exit(app()())
