"""Several names asked for at once; 4 of them are RULER's niah_multiquery."""

from __future__ import annotations

from seerattention.evals.tasks._niah import Haystack, Niah


def create(queries: int = 4, haystack: Haystack = "text") -> Niah:
    """Make the task; `Niah` describes the options."""
    return Niah("niah_multiquery", keys=queries, queries=queries, haystack=haystack)
