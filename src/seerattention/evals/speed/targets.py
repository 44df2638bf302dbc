"""The speeds aimed for on a GPU, and whether a report reaches them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A figure that a report should reach.

    Attributes:
        what: In words.
        table: ``rows`` (attention alone) or ``layers`` (with selection).
        where: Values of the row that is meant; with several such rows the best one counts.
        figure: The row's field.
        bound: What to reach, in the field's unit.
        at_most: Whether less is better.
    """

    what: str
    table: str
    where: dict[str, Any]
    figure: str
    bound: float
    at_most: bool = False

    def judge(self, report: dict[str, Any]) -> dict[str, Any]:
        """Return the target with ``reached`` (the figure) and ``met``; both None if not measured."""
        sign = -1 if self.at_most else 1
        rows = [r for r in report[self.table] if all(r[key] == value for key, value in self.where.items())]
        rows = [r for r in rows if r[self.figure] is not None]
        result: dict[str, Any] = {**asdict(self), "reached": None, "met": None, "backend": None}
        if rows:
            best = max(rows, key=lambda r: sign * r[self.figure])
            figure = best[self.figure]
            result |= {"reached": figure, "met": sign * figure >= sign * self.bound, "backend": best["backend"]}
        return result


def _attention(tokens: int, block: int, mask: str, asked: float) -> dict[str, Any]:
    return {"kind": "backend", "tokens": tokens, "block": block, "mask": mask, "asked": asked}


def _layer(tokens: int, gate: str) -> dict[str, Any]:
    return {"tokens": tokens, "block": 64, "gate": gate}


K = 1024

#: One NVIDIA H200 (docs/design.md), 32 query and 8 KV heads of 128, bf16; times over the best dense kernel's.
TARGETS = (
    Target("8k, block 64, random 10 %: speedup", "rows", _attention(8 * K, 64, "random", 0.1), "speedup", 5),
    Target("32k, block 64, random 10 %: speedup", "rows", _attention(32 * K, 64, "random", 0.1), "speedup", 7.5),
    Target("128k, block 64, random 10 %: speedup", "rows", _attention(128 * K, 64, "random", 0.1), "speedup", 8),
    Target("32k, block 64, gate masks 10 %: speedup", "rows", _attention(32 * K, 64, "gate", 0.1), "speedup", 8),
    Target("32k, block 128, random 10 %: speedup", "rows", _attention(32 * K, 128, "random", 0.1), "speedup", 8),
    Target("32k, everything: share of dense rate", "rows", _attention(32 * K, 64, "full", 1.0), "speedup", 0.85),
    Target("32k, selection, published gate: ms", "layers", _layer(32 * K, "published"), "selection_ms", 0.35, True),
    Target("128k, selection, published gate: ms", "layers", _layer(128 * K, "published"), "selection_ms", 1.5, True),
    Target("32k, selection, 16-token sub-blocks: ms", "layers", _layer(32 * K, "sub16"), "selection_ms", 0.6, True),
    Target("128k, selection, 16-token sub-blocks: ms", "layers", _layer(128 * K, "sub16"), "selection_ms", 3, True),
    Target("128k, selection, extra memory: MB", "layers", _layer(128 * K, "published"), "memory_mb", 100, True),
    Target("128k, selection + attention, 10 %: speedup", "layers", _layer(128 * K, "published"), "speedup", 7.5),
)


def judge(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every target with what the report reached."""
    return [target.judge(report) for target in TARGETS]
