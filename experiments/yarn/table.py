"""The experiment's results as Markdown, dense first: ``python -m experiments.yarn.table results.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(report: dict[str, Any]) -> str:
    """Return perplexity and needles per method and length, then perplexity by position at the longest."""
    rows, v = report["rows"], report["versions"]
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = [
        f"{v['device']}, torch {v['torch']}, transformers {v['transformers']}"
        + (f"; {report['tokens_per_method']:,} training tokens per method" if "steps" in report else "")
        + ". A cell is the perplexity of held-out books and the needles found:",
        "",
        "| method | sparsity | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |",
        "|---" * (2 + len(lengths)) + "|",
    ]
    runs: dict[tuple[str, float | None], dict[int, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["method"], row["asked"]), {})[row["tokens"]] = row
    dense = [run for run in runs if run[1] is None]
    sparse = sorted(
        (run for run in runs if run[1] is not None), key=lambda run: (run[0] == "joint", -(run[1] or 0))
    )
    for run in (*dense, *sparse):
        cells = [
            f"{runs[run][n]['perplexity']:.3f}, {runs[run][n]['needle']:.1%}" if n in runs[run] else "-"
            for n in lengths
        ]
        lines.append(f"| {run[0]} | {_sparsity(run[1])} | {' | '.join(cells)} |")
    longest = max(lengths, default=0)
    last = [run for run in (*dense, *sparse) if longest in runs[run]]
    if last:
        parts = runs[last[0]][longest]["by_position"]
        lines += [
            "",
            f"Perplexity by position at {longest:,} tokens:",
            "",
            "| method | sparsity | " + " | ".join(f"to {p['last']:,}" for p in parts) + " |",
            "|---" * (2 + len(parts)) + "|",
        ]
        for run in last:
            cells = [f"{p['perplexity']:.2f}" for p in runs[run][longest]["by_position"]]
            lines.append(f"| {run[0]} | {_sparsity(run[1])} | {' | '.join(cells)} |")
    lines += _closed(runs, longest)
    return "\n".join(lines)


def learning_rates(reports: list[dict[str, Any]]) -> str:
    """Return runs that differ in the model's learning rate side by side, at the longest length."""
    reports = sorted(reports, key=lambda report: report["run"]["settings"]["lr"])
    longest = max(row["tokens"] for row in reports[0]["rows"])
    kinds = [
        ("YaRN, dense training", None), ("gates distilled afterwards", 0.5), ("joint", 0.5),
        ("gates distilled afterwards", 0.1), ("joint", 0.1),
    ]  # fmt: skip
    lines = [
        f"| learning rate, {longest:,} tokens | "
        + " | ".join(f"{method}, {_sparsity(density)}" if density else "dense" for method, density in kinds)
        + " | gap closed at 90% |",
        "|---" * (2 + len(kinds)) + "|",
    ]
    for report in reports:
        rows = {(r["method"], r["asked"]): r for r in report["rows"] if r["tokens"] == longest}
        dense, _, _, after, joint = (rows[kind]["perplexity"] for kind in kinds)
        cells = [f"{rows[kind]['perplexity']:.3f}, {rows[kind]['needle']:.1%}" for kind in kinds]
        closed = f"{(after - joint) / (after - dense):.0%}"
        lines.append(f"| {report['run']['settings']['lr']:g} | {' | '.join(cells)} | {closed} |")
    return "\n".join(lines)


def _sparsity(density: float | None) -> str:
    return "dense" if density is None else f"{1 - density:.0%}"


def _closed(runs: dict[tuple[str, float | None], dict[int, dict[str, Any]]], longest: int) -> list[str]:
    """Say how much of what gates distilled afterwards lose joint training gets back."""
    dense = runs.get(("YaRN, dense training", None), {}).get(longest)
    said = []
    for (method, density), by_length in sorted(runs.items(), key=lambda run: -(run[0][1] or 0)):
        after = runs.get(("gates distilled afterwards", density), {}).get(longest)
        if method != "joint" or dense is None or longest not in by_length:
            continue
        joint = by_length[longest]
        rise = joint["perplexity"] / dense["perplexity"] - 1
        text = f"{_sparsity(density)} sparse {rise:+.2%}"
        if after is not None and after["perplexity"] > dense["perplexity"]:
            lost = after["perplexity"] - dense["perplexity"]
            text += f" (gap closed: {(after['perplexity'] - joint['perplexity']) / lost:.0%})"
        said.append(text)
    if not said:
        return []
    return [
        "",
        f"Joint training against dense training at {longest:,} tokens, perplexity: {'; '.join(said)}.",
    ]


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
