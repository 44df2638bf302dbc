"""One needle asked for among needles of other names; 4 of them are RULER's niah_multikey_1."""

from __future__ import annotations

from seerattention.evals.tasks._niah import Haystack, Niah


def create(keys: int = 4, haystack: Haystack = "text") -> Niah:
    """Make the task; `Niah` describes the options."""
    return Niah("niah_multikey", keys=keys, haystack=haystack)
