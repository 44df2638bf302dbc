"""All numbers of one name; 4 of them are RULER's niah_multivalue."""

from __future__ import annotations

from seerattention.evals.tasks._niah import Haystack, Niah


def create(values: int = 4, haystack: Haystack = "text") -> Niah:
    """Make the task; `Niah` describes the options."""
    return Niah("niah_multivalue", values=values, haystack=haystack)
