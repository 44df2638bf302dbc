"""How answers are scored.

Source: RULER (arXiv 2404.06654), section 4, and its published code: ``string_match_all``,
``string_match_part`` and ``postprocess_pred`` of its evaluation, here per sample and in 0 to 1, not per cent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(answer: str) -> str:
    """Strip an answer and put a newline for every control character, as RULER does."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def share_found(answer: str, expected: Sequence[str]) -> float:
    """Return the share of the expected strings that the answer contains, whatever their case."""
    text = cleaned(answer).lower()
    return sum(e.lower() in text for e in expected) / len(expected)


def whether_any(answer: str, expected: Sequence[str]) -> float:
    """Return 1 if the answer contains any of the expected strings, whatever their case, else 0."""
    text = cleaned(answer).lower()
    return float(any(e.lower() in text for e in expected))
