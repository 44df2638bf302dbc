"""The results of `experiments.decoding.run` as Markdown and as a picture of quality against budget.

python -m experiments.decoding.table runs/decoding/*.json --figure quality.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from seerattention.measure.intervals import mean_interval, newcombe, rise
from seerattention.measure.plot import COLOURS, drawn

NAMES = {
    "dense": "dense decoding",
    "gates": "SeerAttention",
    "oracle_mass": "oracle (true mass)",
    "quest": "Quest",
    "meanpool": "mean-pool",
    "streaming": "sink + local",
    "random": "random",
    "snapkv": "SnapKV (evicts)",
    "h2o": "H2O (evicts)",
}

#: Marker and colour of what is drawn: random would flatten the picture.
DRAWN = {
    "gates": ("o", COLOURS["gate"]),
    "oracle_mass": ("s", COLOURS["dense"]),
    "quest": ("^", "C1"),
    "meanpool": ("v", "C2"),
    "streaming": ("D", "C3"),
    "snapkv": ("P", "C4"),
    "h2o": ("X", "C5"),
}

Row = dict[str, Any]


def tables(reports: list[dict[str, Any]]) -> str:
    """Return every report as a table, one after the other."""
    return "\n\n".join(table(report) for report in reports)


def table(report: dict[str, Any]) -> str:
    """Return a report: a line per method, a column per budget."""
    made = {"perplexity": _perplexity, "needles": _shares, "tasks": _tasks, "problems": _problems}
    lines, rows = [_about(report)], report["rows"]
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        if prompt != "dense":
            lines += ["", f"Prompts by `{prompt}`, decoding dense or sparse:"]
        # Beside dense prompts and dense decoding.
        own = [row for row in rows if row["prompt"] == prompt or row["prompt"] == row["method"] == "dense"]
        lines += ["", *made[report["part"]](own)]
    return "\n".join(lines)


def _about(report: dict[str, Any]) -> str:
    v, s = report["versions"], report["settings"]
    model = {"bundled": "the bundled teacher"}.get(s["model"], s["model"])
    what = {
        "perplexity": "windows of {length:,} tokens of held-out books, all after the first half decoded: "
        "rise of perplexity over dense",
        "needles": "documents of {length:,} tokens, eight questions behind the prompt of each: answers "
        "right in every digit",
        "tasks": "questions of {length:,} tokens per task, after RULER: answers found",
        "problems": "problems of GSM8K behind {length:,} tokens of solved ones",
    }[report["part"]].format(**s)
    return (
        f"{v['device']}, torch {v['torch']}, transformers {v['transformers']}; {model}; {s['samples']} "
        f"{what}, with 95 % intervals of the difference to dense."
    )


def _grid(rows: list[Row], dense: str, cell: Any) -> list[str]:
    """Return the table of one kind of cell."""
    budgets = sorted({row["budget"] for row in rows if row["budget"]})
    cells = {(row["method"], row["budget"]): row for row in rows}
    read = {b: [row["tokens_read"] for row in rows if row["budget"] == b] for b in budgets}
    lines = [
        f"| {dense} | " + " | ".join(f"{b:,} tokens" for b in budgets) + " |",
        "|---" * (1 + len(budgets)) + "|",
        "| *tokens read, as measured* | " + " | ".join(_range(read[b]) for b in budgets) + " |",
    ]
    for method, name in NAMES.items():
        own = [cells.get((method, budget), cells.get((method, None))) for budget in budgets]
        if any(own):
            lines.append(f"| {name} | " + " | ".join(cell(row) if row else "-" for row in own) + " |")
    return lines


def _range(values: list[float]) -> str:
    low, high = (f"{value:,.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _plus_minus(values: list[float], others: list[float], form: str) -> str:
    differences = [a - b for a, b in zip(values, others, strict=True)]
    low, high = mean_interval(differences)
    return f"{fmean(values):{form}} ({fmean(differences):+{form}} ± {(high - low) / 2:{form}})"


def _perplexity(rows: list[Row]) -> list[str]:
    dense = rows[0]

    def cell(row: Row) -> str:
        more, half = rise(row["losses"], dense["losses"])
        return f"{more:+.2%} ± {half:.2%}"

    return _grid(rows[1:], f"dense: {dense['perplexity']:.3f}", cell)


def _shares(rows: list[Row]) -> list[str]:
    dense, count = rows[0], len(rows[0]["shares"])

    def cell(row: Row) -> str:
        low, high = newcombe(row["share"], count, dense["share"], count)
        return f"{row['share']:.1%} ({low:+.0%} to {high:+.0%})"

    return _grid(rows[1:], f"dense: {dense['share']:.1%}", cell)


def _tasks(rows: list[Row]) -> list[str]:
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        if len(own) == 1:
            lines += [f"{task}: dense attention finds {own[0]['share']:.1%}, so nothing else was asked.", ""]
        else:
            lines += [f"{task}:", "", *_shares(own), ""]
    return lines[:-1]


def _problems(rows: list[Row]) -> list[str]:
    dense = rows[0]
    lines = [
        "| method | budget | tokens read | perplexity of the solution | agreement with dense "
        "| tokens generated | ended | correct |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        more, half = rise(row["losses"], dense["losses"])
        first = row is dense
        cells = [
            NAMES[row["method"]],
            "" if first else f"{row['budget']:,}",
            "" if first else f"{row['tokens_read']:,.0f}",
            f"{row['perplexity']:.3f}" if first else f"{more:+.2%} ± {half:.2%}",
            "" if first else f"{fmean(row['agreement']):.1%}",
            f"{fmean(row['lengths']):.0f}" if first else _plus_minus(row["lengths"], dense["lengths"], ".0f"),
            f"{row['ended']} of {len(row['lengths'])}",
            f"{row['correct']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(reports: list[dict[str, Any]], path: Path) -> None:
    """Draw the rise of perplexity, and the needles found, against the tokens read."""
    panels = [r for r in reports if r["part"] in ("perplexity", "needles")]
    title = "Decoding: quality against budget"
    with drawn(path, 1, len(panels), title=title, figsize=(5 * len(panels), 4.2), squeeze=False) as (_, axes):
        for axis, report in zip(axes[0], panels, strict=True):
            _panel(axis, report)
            axis.legend(fontsize=8)


def _panel(axis: Any, report: dict[str, Any]) -> None:
    dense, *rows = (row for row in report["rows"] if row["prompt"] == "dense")
    books = report["part"] == "perplexity"
    level = 0 if books else dense["share"]
    axis.axhline(level, color=COLOURS["dense"], linestyle="--", linewidth=1, label="dense")
    for method, (marker, colour) in DRAWN.items():
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["tokens_read"])
        if own:
            values = [100 * rise(row["losses"], dense["losses"])[0] if books else row["share"] for row in own]
            read = [row["tokens_read"] for row in own]
            axis.plot(read, values, f"{marker}-", label=NAMES[method], color=colour, linewidth=1)
    budgets = sorted({row["budget"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axis.minorticks_off()
    axis.set_xlabel("tokens read per token (measured)")
    axis.set_ylabel("rise of perplexity, %" if books else "needles found")
    where = f"{report['settings']['length']:,} tokens, {report['versions']['device']}"
    axis.set_title(f"{report['settings']['model']}, {where}", fontsize=10)
    axis.grid(alpha=0.3)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+", help="files that run made")
    parser.add_argument("--figure", type=Path, help="picture to draw of them")
    args = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in args.reports]
    print(tables(reports))
    if args.figure is not None:
        draw(reports, args.figure)


if __name__ == "__main__":
    main()
