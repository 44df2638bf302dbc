"""One needle; ``haystack="noise"`` is RULER's niah_single_1, ``"text"`` its niah_single_2."""

from __future__ import annotations

from seerattention.evals.tasks._niah import Haystack, Niah


def create(haystack: Haystack = "text") -> Niah:
    """Make the task; `Niah` describes the options."""
    return Niah("niah_single", haystack=haystack)
