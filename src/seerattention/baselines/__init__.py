"""Other ways to rank blocks, as scorers: a comparison with the gate differs in one object.

One file per method, found by its name; it defines ``create(**options) -> Scorer``. docs/method.md has
a table of them. Dense attention is not among them: it differs in how much is read, not in what comes
first, so it is the policy ``top_k:1`` with any scorer, or no scorer at all.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from seerattention.gate import Scorer


def names() -> list[str]:
    """Return the names of all baselines."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def create(name: str, **options: Any) -> Scorer:
    """Make a baseline.

    Args:
        name: One of `names`.
        options: What the baseline's file takes; ``block_size`` in all of them.

    Raises:
        ValueError: If there is no such baseline.
    """
    if name not in names():
        raise ValueError(f"unknown baseline {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"seerattention.baselines.{name}").create(**options)
