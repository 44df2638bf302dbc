"""The speeds aimed for on a GPU, and whether a report of ``bench prefill`` or ``bench decode`` reaches them.

python benchmarks/targets.py benchmarks/results/<device>/prefill.json

prints them and writes them into the report.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seerattention.files import write_json


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
            met = sign * figure >= sign * self.bound
            result |= {"reached": figure, "met": met, "backend": best.get("backend") or best["variant"]}
        return result


def _speedup(what: str, bound: float, tokens: int, block: int, mask: str, asked: float = 0.1) -> Target:
    where = {"kind": "backend", "tokens": tokens, "block": block, "mask": mask, "asked": asked}
    return Target(what, "rows", where, "speedup", bound)


def _layer(what: str, bound: float, tokens: int, gate: str, figure: str) -> Target:
    where = {"tokens": tokens, "block": 64, "gate": gate}
    return Target(what, "layers", where, figure, bound, at_most=figure != "speedup")


_8K, _32K, _128K = 8192, 32768, 131072

#: For one NVIDIA H200, 32 query and 8 KV heads of 128, bf16; speedups over the best dense kernel.
TARGETS = (
    _speedup("8k, blocks of 64, random 10 %: speedup", 6.2, _8K, 64, "random"),
    _speedup("32k, blocks of 64, random 10 %: speedup", 8.2, _32K, 64, "random"),
    _speedup("128k, blocks of 64, random 10 %: speedup", 9.8, _128K, 64, "random"),
    _speedup("32k, blocks of 64, gate masks 10 %: speedup", 8, _32K, 64, "gate"),
    _speedup("32k, blocks of 128, random 10 %: speedup", 8, _32K, 128, "random"),
    _speedup("32k, everything read: share of the dense rate", 0.85, _32K, 64, "full", 1.0),
    _layer("32k, selection by the published gate: ms", 0.35, _32K, "published", "selection_ms"),
    _layer("128k, selection by the published gate: ms", 1.5, _128K, "published", "selection_ms"),
    _layer("32k, selection with 16-token sub-blocks: ms", 0.6, _32K, "sub16", "selection_ms"),
    _layer("128k, selection with 16-token sub-blocks: ms", 3, _128K, "sub16", "selection_ms"),
    _layer("128k, extra memory of selection, published gate: MB", 100, _128K, "published", "memory_mb"),
    _layer("128k, extra memory of selection, sub-blocks: MB", 100, _128K, "sub16", "memory_mb"),
    _layer("128k, selection and attention, 10 %: speedup", 7.5, _128K, "published", "speedup"),
    _layer("32k, selection by the default gate in 8 bits: ms", 0.35, _32K, "8-bits", "selection_ms"),
    _layer("128k, selection by the default gate in 8 bits: ms", 3, _128K, "8-bits", "selection_ms"),
    _layer("32k, selection in 8 bits and attention, 10 %: speedup", 5.8, _32K, "8-bits", "speedup"),
    _layer("128k, selection in 8 bits and attention, 10 %: speedup", 7.2, _128K, "8-bits", "speedup"),
)


#: The same for a step of decoding, blocks of 64 per KV head: attention alone, and with choosing.
DECODE_TARGETS = tuple(
    Target(
        f"{batch} x {tokens // 1024}k: {what}",
        "rows",
        {"batch": batch, "tokens": tokens, "variant": variant},
        "speedup",
        bound,
    )
    for what, variant, bounds in (
        ("attention alone", "triton", (3.5, 6, 9, 8.5, 9.4, 9.8)),
        ("with choosing by keys' summaries", "with choosing, default", (2.2, 4.5, 7, 6, 7.5, 8)),
        ("with choosing by blocks' summaries", "with choosing, sub64", (2.2, 4.5, 7, 6, 7.5, 8)),
    )
    for (batch, tokens), bound in zip(
        ((1, _32K), (1, _128K), (8, _128K), (16, _32K), (16, _128K), (64, _128K)), bounds, strict=True
    )
)


def judge(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every target with what the report reached."""
    return [target.judge(report) for target in (TARGETS if "layers" in report else DECODE_TARGETS)]


def main() -> None:
    """Judge a report and print what was reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="a result of seerattention bench prefill or decode")
    path = parser.parse_args().report
    report = json.loads(path.read_text())
    report["targets"] = judge(report)
    write_json(path, report)
    words = {True: "reached", False: "missed", None: "not measured"}
    for row in report["targets"]:
        reached = "" if row["reached"] is None else f"{row['reached']:.2f} by {row['backend']}"
        sign = "<=" if row["at_most"] else ">="
        print(f"{row['what']:52} {sign} {row['bound']:<6} {words[row['met']]:12} {reached}")


if __name__ == "__main__":
    main()
