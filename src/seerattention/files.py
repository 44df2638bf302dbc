"""Files that appear whole or not at all: on the disk under another name, before they get theirs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file that then becomes ``path``; on failure nothing changes.

    The temporary file has one name, so that a process that is killed again and again leaves one behind.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with _filling(path):
            write(temporary)
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON types into a file, whole or not at all; its folder is made if it does not exist.

    Raises:
        OSError: If the folder cannot be written.
    """
    with staged(path.parent) as folder:
        (folder / path.name).write_text(json.dumps(value, indent=2) + "\n")


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Write files into a folder together: they appear in it, one by one, once all of them are complete.

    Other files in the folder stay. Fails before any work where the folder cannot be written.

    Args:
        folder: Where the files go; made if it does not exist.

    Yields:
        A temporary folder beside them to write into.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder = Path(folder)
    made = not folder.exists()
    temporary = _temporary(folder, ".writing-", folder)
    complete = False
    try:
        with _filling(folder):
            yield temporary
        _flush(temporary)
        for file in sorted(temporary.iterdir()):
            file.replace(folder / file.name)
        complete = True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made and not complete:
            folder.rmdir()


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder all or nothing: yields a temporary one that replaces ``folder`` on success.

    Raises:
        OSError: If the parent folder cannot be written.
    """
    folder = Path(folder).absolute()
    temporary = _temporary(folder.parent, f".{folder.name}-", folder)
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        with _filling(folder):
            yield new
        _flush(new)
        if folder.exists():
            folder.replace(old)
        try:
            new.replace(folder)
        except OSError:
            if old.exists():
                old.replace(folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(parent: Path, prefix: str, wanted: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise OSError(f"cannot write {wanted} ({error}); choose a folder that can be written") from error


def _flush(path: Path) -> None:
    """Wait until a file, or all of a folder, are on the disk; they become as readable as new files are."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            # safetensors makes files that only their owner can read.
            file.chmod(0o666 & ~mask)
            with file.open("rb") as written:
                os.fsync(written.fileno())


@contextmanager
def _filling(path: Path) -> Iterator[None]:
    """Let safetensors say as everything else does that a disk is full."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path} ({error}); free some space or choose another folder") from error


def check_readable(path: Path) -> None:
    """Raise what the system says where a file cannot be read: to safetensors each of them is missing."""
    with path.open("rb"):
        pass


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); convert it") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON.
    """
    return _parsed(path.read_bytes(), str(path))


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the content of every line of a JSON Lines file, and where it stands.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a line is no JSON.
    """
    with path.open("rb") as lines:
        # Lines of bytes end at line feeds alone, those of text also at what JSON has inside of strings.
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            yield where, _parsed(line, where)


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    # Brackets within brackets, deeper than Python reads.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON that can be read: {error}") from error
