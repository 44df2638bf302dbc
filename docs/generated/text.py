"""What the generated parts are written with: numbers, tables, paragraphs."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

Report = dict[str, Any]


class Cells(string.Formatter):
    """Format strings that also know ``~``, three digits, and a leading ``?``, nothing for 0 and None."""

    def format_field(self, value: Any, spec: str) -> str:
        """Format one value."""
        if spec.startswith("?"):
            return self.format_field(value, spec[1:]) if value else ""
        return digits(value) if spec == "~" else format(value, spec)

    def of(self, text: str, row: Report) -> str:
        """Fill in a row's values by name, or by ``row`` where a name is no word."""
        return self.vformat(text, (), {**row, "row": row})


def digits(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def table(columns: str, rows: Iterable[Report]) -> str:
    """Return a Markdown table.

    Args:
        columns: Title and cell of every column, as in ``"tokens: {tokens:,} | gate: {gate}"``.
        rows: What cells take their values from.
    """
    titles, cells = zip(*(column.split(": ", 1) for column in columns.split(" | ")), strict=True)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join(lines + [f"| {Cells().of(' | '.join(cells), row)} |" for row in rows])


def under(titles: Iterable[str], cells: str = "at") -> str:
    """Return the columns of a table whose rows have a list of cells, one under each title."""
    return " | ".join(f"{title}: {{{cells}[{i}]}}" for i, title in enumerate(titles))


def parts(*texts: str) -> str:
    """Return paragraphs and tables under one another, empty ones left out."""
    return "\n\n".join(filter(None, texts))
