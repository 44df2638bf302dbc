"""Pictures in files. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seerattention.files import check_writable

#: What pictures' names end in.
FORMATS = (".png", ".svg", ".pdf")

COLOURS = {"gate": "#1f6feb", "live": "#6f42c1", "dense": "#24292f", "other": "#9a6700"}


def require_matplotlib(picture: Path | None = None) -> None:
    """Raise before any work if there is nothing to draw with, or a picture could not be written.

    Raises:
        ModuleNotFoundError: Naming the extra to install.
        OSError: If the picture's place cannot be written.
        ValueError: If its name has another end than `FORMATS`.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("figures need matplotlib; pip install 'seerattention[plot]'")
    if picture is not None and check_writable(picture).suffix not in FORMATS:
        raise ValueError(f"a picture's name must end in {', '.join(FORMATS)}, got {picture}")


@contextmanager
def drawn(path: Path, *rows_columns: int, title: str = "", **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes to draw on, as matplotlib's ``subplots`` makes them; then it is written.

    Args:
        path: The picture.
        rows_columns: Rows and columns of axes.
        title: Above all of them.
        options: Of ``subplots``.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*rows_columns, constrained_layout=True, **options)
    try:
        yield figure, axes
        if title:
            figure.suptitle(title)
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
