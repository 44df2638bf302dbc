"""What gates minimise, one file per objective, found by its name.

A file defines ``create(**options) -> Objective``. docs/method.md compares them with those that lost.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

from torch import Tensor


class Objective(Protocol):
    """Compares a gate's scores with the attention map it should predict."""

    def __call__(self, target: Tensor, scores: Tensor, valid: Tensor, always: Tensor) -> Tensor:
        """Return a scalar to minimise.

        Args:
            target: fp32 ``[B, H, R, N]``, the rows that count of the pooled map; rows sum to 1.
            scores: fp32 ``[B, H, R, N]`` from `AttnGate`, before softmax.
            valid: bool ``[R, N]``, the blocks that a row sees, some in every row.
            always: bool ``[R, N]``, those of them that are read whatever their score.

        Raises:
            ValueError: If target and scores differ in shape.
        """
        ...


def names() -> list[str]:
    """Return the names of all objectives."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def create(name: str, **options: Any) -> Objective:
    """Make an objective.

    Args:
        name: One of `names`.
        options: What the objective's file takes.

    Raises:
        ValueError: If there is no such objective.
    """
    if name not in names():
        raise ValueError(f"unknown objective {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"seerattention.train.objectives.{name}").create(**options)
