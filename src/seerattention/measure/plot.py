"""Pictures in files. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import importlib.util
from typing import Any

COLOURS = {"gate": "#1f6feb", "live": "#6f42c1", "dense": "#24292f", "other": "#9a6700"}


def require_matplotlib() -> None:
    """Raise before any work if there is nothing to draw with.

    Raises:
        ModuleNotFoundError: Naming the extra to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("figures need matplotlib; pip install 'seerattention[plot]'")


def pyplot() -> Any:
    """Return matplotlib set up to draw into files."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
