"""Files and folders that appear whole or not at all, in folders that one process at a time writes to.

What is not complete has `UNFINISHED` and its later name as its name; a folder in use holds a file called
`UNFINISHED`. A killed process leaves them behind, and the next that writes there removes them.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

UNFINISHED = ".writing"

#: The locks that this process holds.
_held: set[Path] = set()


def check_writable(path: str | Path, *, folder: bool = False) -> Path:
    """Refuse a file, or a folder, that could not be written; nothing is made.

    Returns:
        Where it is, behind links.

    Raises:
        OSError: If something else is there, or it cannot be made.
    """
    real = Path(os.path.realpath(path))
    there = next(one for one in (real, *real.parents) if one.exists())
    kept = there if there.is_dir() else there.parent
    why = ""
    if there == real and not (real.is_dir() if folder else real.is_file()):
        why = f"it is {'not a folder' if folder else 'a folder' if real.is_dir() else 'not a file'}"
    elif there != real and not there.is_dir():
        why = f"{there} is not a folder"
    elif not os.access(kept, os.W_OK | os.X_OK):
        why = f"{kept} is not yours to write to"
    if why:
        raise OSError(f"cannot write {path} ({why}); choose a folder that can be written")
    return real


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path`` that then becomes it; on failure nothing changes.

    Raises:
        OSError: If something else is there, or it cannot be written.
    """
    path = check_writable(path)
    unfinished = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _filling(path):
            write(unfinished)
        _flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain JSON types as `write_whole` does."""
    write_whole(path, lambda file: file.write_text(json.dumps(value, indent=2) + "\n"))


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder all or nothing: yields a new one that takes the place of ``folder`` on success.

    Wherever the system can exchange two names, there is no moment without one of both. Elsewhere a kill
    between two renames leaves none, and the next call puts the old one back before anything else.

    Raises:
        OSError: If something else is there, or it cannot be written.
        ValueError: If another process is writing it.
    """
    folder = check_writable(folder, folder=True)
    beside = _beside(folder)
    new, old = beside / "new", beside / "old"
    try:
        with locked(beside):
            if old.exists() and not folder.exists():
                old.replace(folder)
            _remove(new, old)
            new.mkdir()
            try:
                with _filling(folder):
                    yield new
                _flush(new)
                _exchange(new, folder, old)
            finally:
                _remove(new, old)
    finally:
        with suppress(OSError):
            beside.rmdir()


@contextmanager
def locked(folder: str | Path, *, again: bool = False, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes to a folder, which is made; first remove what a killed one left.

    Args:
        folder: The folder. Where its file system has no locks, there is none.
        again: Whether this process may have it locked already.
        wait: Whether to wait for another process that is writing to it.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If another process is writing to it and is not waited for.
    """
    folder = check_writable(folder, folder=True)
    file = folder / UNFINISHED
    if again and file in _held:
        yield
        return
    made = not folder.exists()
    descriptor = _opened(file, wait)
    _held.add(file)
    try:
        _remove(*folder.glob(f"{UNFINISHED}-*"))
        yield
    finally:
        _held.discard(file)
        # Before it is free: who opened it meanwhile sees that it is no longer the one.
        if _is(descriptor, file):
            file.unlink()
        if made:
            with suppress(OSError):
                folder.rmdir()
        os.close(descriptor)


def _opened(file: Path, wait: bool) -> int:
    """Open a file that this process alone has open so; again, if its last owner removed it meanwhile."""
    for _ in itertools.count() if wait else range(2):
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            if _free(descriptor, wait) and _is(descriptor, file):
                return descriptor
            os.close(descriptor)
    raise ValueError(f"another process is writing to {file.parent}; wait for it or choose another folder")


def _free(descriptor: int, wait: bool) -> bool:
    """Lock a file, or say that another process has it locked."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ModuleNotFoundError, OSError):
        # There are no locks, or not on this file system.
        pass
    return True


def _is(descriptor: int, file: Path) -> bool:
    return file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())


def _beside(path: Path) -> Path:
    return path.with_name(f"{UNFINISHED}-{path.name}")


def _exchange(new: Path, folder: Path, old: Path) -> None:
    """Give a folder the name of another, which is then called ``new`` or ``old``."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2
    if not folder.exists():
        new.replace(folder)
    elif rename is None or rename(here, os.fsencode(new), here, os.fsencode(folder), exchange):
        folder.replace(old)
        try:
            new.replace(folder)
        except OSError:
            old.replace(folder)
            raise


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
    """Yield the content of every line of a JSON Lines file that is not blank, and where it stands.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a line is no JSON.
    """
    with path.open("rb") as lines:
        # Lines of bytes end at line feeds alone, those of text also at what JSON has inside of strings.
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            if line.strip():
                yield where, _parsed(line, where)


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    # Brackets within brackets, deeper than Python reads.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON that can be read: {error}") from error
