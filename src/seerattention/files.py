"""Files that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Write files into a folder together: they appear in it once all of them are complete.

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    except OSError as error:
        raise OSError(f"cannot write {folder} ({error}); choose a folder that can be written") from error
    complete = False
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            file.replace(folder / file.name)
        complete = True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made and not complete:
            folder.rmdir()
