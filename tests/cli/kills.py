"""Ends commands before one of their operations on files, or halts them there, and looks at what comes of it.

A script, since it forks: what is slow to import is there once, and every run is a process of its own.
Prints a line per command, and one for each run whose result was not what it had to be.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from seerattention import cli

#: What of audited operations is done to files.
OPERATIONS = ("open", "os.", "shutil.", "ctypes.dlsym")

#: Numbers of a clock, in whatever JSON.
CLOCK = ("seconds", "prefill_s", "date")

REFUSED = "another process is writing to"


@dataclass(frozen=True)
class Command:
    """One command on a folder, which is made anew before every run.

    Attributes:
        name: What it is called.
        arguments: What a person types.
        before: Fills the folder.
    """

    name: str
    arguments: list[str]
    before: Callable[[], object] = lambda: None


@dataclass
class Work:
    """Where commands write.

    Attributes:
        folder: Theirs; the same in all runs, since results name it.
        said: What the last run printed.
    """

    folder: Path
    said: Path

    def start(self, command: Command, act: Callable[[int], None] = lambda count: None) -> int:
        """Return the process of a command that calls ``act`` with the number of each operation before it."""
        if pid := os.fork():
            return pid
        code = 99
        try:
            self._watch(act)
            result = CliRunner().invoke(cli.app(), command.arguments)
            code = result.exit_code
            self.said.write_text(f"{result.output}\n{result.exception!r}")
        finally:
            os._exit(code)

    def _watch(self, act: Callable[[int], None]) -> None:
        count, inside = 0, False

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count, inside
            if inside or not event.startswith(OPERATIONS) or not self._ours(event, arguments):
                return
            count, inside = count + 1, True
            act(count)
            inside = False

        sys.addaudithook(hook)

    def _ours(self, event: str, arguments: tuple[Any, ...]) -> bool:
        first = arguments[0] if arguments else None
        if event == "ctypes.dlsym":
            return arguments[1] == "renameat2"
        if isinstance(first, str | bytes | os.PathLike):
            path = os.fsdecode(first)
            # In a folder that is being removed paths are relative to it.
            inner = event in ("os.remove", "os.rmdir") and not os.path.isabs(path)
            return inner or Path(path).is_relative_to(self.folder)
        return False

    def anew(self, command: Command) -> None:
        """Make the folder as it is before a command."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        command.before()

    def found(self) -> dict[str, Any]:
        """Return every file's content, without what a clock says."""
        files = [p for p in sorted(self.folder.rglob("*")) if "tensorboard" not in p.parts]
        return {str(p.relative_to(self.folder)): _content(p) for p in files}


def _content(path: Path) -> Any:
    if path.is_dir():
        return "folder"
    if path.suffix == ".md":
        return "text with times"
    try:
        lines = {".json": [path.read_text()], ".jsonl": path.read_text().splitlines()}[path.suffix]
        return [_timeless(json.loads(line)) for line in lines]
    except (KeyError, ValueError):
        return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in CLOCK}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def ended(pid: int) -> int:
    """Return how a process ended, a signal as its negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def faults(work: Work, command: Command, tries: Callable[[int], list[tuple[int, bool]]]) -> Iterator[str]:
    """Yield what went wrong, after a line about how many operations there are."""
    total = 0

    def counted(count: int) -> None:
        work.said.with_name("count").write_text(str(count))

    work.anew(command)
    if ended(work.start(command, counted)):
        yield f"{command.name}: {work.said.read_text()}"
        return
    expected = work.found()
    total = int(work.said.with_name("count").read_text())
    if left := [name for name in expected if ".writing" in name]:
        yield f"{command.name} left {left}"
    runs = tries(total)
    for at, torn in runs:
        work.anew(command)
        if (code := ended(work.start(command, _killing(work, at, torn)))) != -signal.SIGKILL:
            yield f"{command.name} was to be killed at {at} and ended with {code}"
        yield from _finished(work, command, expected, f"killed at {at}{', torn' if torn else ''}")
    for at in sorted({at for at, _ in runs}):
        yield from _second(work, command, expected, at)
    print(f"{command.name}: {total} operations on files, {len(runs)} kills", flush=True)


def _killing(work: Work, at: int, torn: bool) -> Callable[[int], None]:
    def act(count: int) -> None:
        if count == at:
            for path in work.folder.rglob("*") if torn else ():
                if ".writing-" in str(path) and path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def _finished(work: Work, command: Command, expected: dict[str, Any], when: str) -> Iterator[str]:
    """Run a command to its end; yield what differs from what had to come of it."""
    if ended(work.start(command)):
        yield f"{command.name}, {when}, cannot be finished: {work.said.read_text()}"
        return
    found = work.found()
    if other := [name for name in {**expected, **found} if found.get(name) != expected.get(name)]:
        yield f"{command.name}, {when}, ends with other {other}"


def _second(work: Work, command: Command, expected: dict[str, Any], at: int) -> Iterator[str]:
    """Halt a command before an operation, run it a second time, let the first go on."""

    def act(count: int) -> None:
        if count == at:
            os.kill(os.getpid(), signal.SIGSTOP)

    work.anew(command)
    first = work.start(command, act)
    _, status = os.waitpid(first, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        yield f"{command.name} was to be halted at {at} and ended with {status}"
        return
    held = any(path.name == ".writing" for path in work.folder.rglob("*"))
    code = ended(work.start(command))
    said = " ".join(work.said.read_text().split())
    if (code, REFUSED in said) != ((2, True) if held else (0, False)):
        yield f"{command.name}, halted at {at}, {held=}: the second ended with {code}: {said}"
    os.kill(first, signal.SIGCONT)
    if code := ended(first):
        yield f"{command.name}, halted at {at}, then ended with {code}: {work.said.read_text()}"
    yield from _finished(work, command, expected, f"halted at {at}")


def publish(folder: Path) -> None:
    """Write gates of a model of one layer in the published layout."""
    folder.mkdir()
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    gate = {"seerattn_gate_block_size": 64, "seerattn_gate_hidden_size": 16}
    about = {"base_model": "someone/tiny", "model_type": "qwen3", **shape, **gate}
    (folder / "config.json").write_text(json.dumps(about))
    weights = {"model.layers.0.self_attn.attn_gate.mask_linear_k.weight": torch.ones(2, 48, 16)}
    torch.save(weights, folder / "attn_gate_weights.pth")


def commands(work: Work, base: Path, text: Path) -> list[Command]:
    """Return the commands; those that need gates get them from the first."""
    kept = work.folder.with_name("kept")
    small = [f"--set=gate.{name}" for name in ("block_size=16", "q_sub_block=8", "k_sub_block=8")]
    small += ["--text", str(text), "--length", "64", "--set", "save_every=1", "--device", "cpu"]

    def teach(command: str, out: str, *more: str) -> list[str]:
        return [command, str(base), "--out", str(work.folder / out), *small, *more]

    def ready(name: str, at: str) -> Callable[[], object]:
        return lambda: shutil.copytree(kept / name, work.folder / at)

    settings = kept.with_suffix(".toml")
    published = kept.with_name("published")
    distil = Command("distill", teach("distill", "out", "--steps", "2"))
    convert = ["convert", str(published), str(work.folder / "gates")]
    calibrate = ["calibrate", str(work.folder / "gates"), "--text", str(text), "--density", "0.6"]
    calibrate += ["--length", "256", "--windows", "2", "--device", "cpu"]
    work.anew(distil)
    assert ended(work.start(distil)) == 0, work.said.read_text()
    shutil.copytree(work.folder, kept)
    publish(published)
    settings.write_text(
        f'out = "{work.folder / "out"}"\ntext = "{text}"\nlengths = [128]\ndensities = [0.5]\nsamples = 2\n'
        f'[model]\nname = "{base}"\ndevice = "cpu"\n[methods.mine]\ngates = "{kept / "out" / "gates"}"\n'
        "[tasks.perplexity]\n"
    )
    return [
        distil,
        Command("distill further", teach("distill", "out", "--steps", "3"), ready("out", "out")),
        Command("finetune", teach("finetune", "out", "--steps", "2", "--set", "warmup_gate_steps=1")),
        Command("eval", ["eval", str(settings)]),
        Command("calibrate", calibrate, ready("out/gates", "gates")),
        Command(
            "calibrate a copy", [*calibrate, "--out", f"{work.folder}/copy"], ready("out/gates", "gates")
        ),
        Command("convert", convert),
        Command("convert over gates", convert, ready("out/gates", "gates")),
    ]


def main(base: str, text: str, folder: str, tries: str) -> None:
    """Try every kill if ``tries`` is 0, else so many of each command, drawn with a fixed seed."""
    torch.set_num_threads(1)
    work = Work(Path(folder) / "work", Path(folder) / "said")
    rng = random.Random(0)

    def drawn(total: int) -> list[tuple[int, bool]]:
        # Torn: what was being written is there by half.
        kills = [(at, torn) for at in range(1, total + 1) for torn in (False, True)]
        return rng.sample(kills, int(tries)) if int(tries) else kills

    # Whatever is imported late is imported once.
    CliRunner().invoke(
        cli.app(), ["distill", base, "--text", text, "--length", "64", "--dry-run", "--out", folder]
    )
    wrong = 0
    for command in commands(work, Path(base), Path(text)):
        for fault in faults(work, command, drawn):
            print(fault, flush=True)
            wrong = 1
    sys.exit(wrong)


if __name__ == "__main__":
    main(*sys.argv[1:])
