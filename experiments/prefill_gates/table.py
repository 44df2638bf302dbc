"""The results of `experiments.prefill_gates.run` as Markdown.

python -m experiments.prefill_gates.table runs/prefill/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from seerattention.measure.intervals import rise

#: The way whose rise of perplexity others' are shares of.
RIVAL = "xattention"

Row = dict[str, Any]


def table(results: dict[str, Any]) -> str:
    """Return a grid per length, of what reading less costs, and one of what is found.

    A cell is the rise of perplexity over dense attention with its 95 % interval over the windows, the rise
    as a share of XAttention's and, where documents were asked, the share of their numbers found; or the share
    of answers foreseen and the mean logarithm of their tokens' likelihood. Of several seeds it is the mean,
    with the seeds' lowest and highest in brackets. Where a method spends blocks in its own way, a cell ends
    with what it read.
    """
    ways = ways_of(results)
    sparse = {name: rows for name, rows in ways.items() if name != "dense"}
    asked = [f"{density:g}" for density in results["settings"]["densities"]]
    lines = []
    for length in map(str, results["settings"]["eval_lengths"]):

        def read(density: str, length: str = length) -> str:
            alike = (row for rows in sparse.values() for row in rows if "way" not in row)
            cells = (row["perplexity"][length] for row in alike)
            return _ends([cell[density]["density"] for cell in cells if density in cell], ".1%")

        lines += _head(f"{int(length):,} tokens", "cost at 32k", *map(_percent, asked))
        lines.append(_line("*blocks read, as measured*", "", *map(read, asked) if sparse else ""))
        for name, rows in sparse.items():
            price = f"{rows[0]['cost']:.2%}" if "cost" in rows[0] else ""
            lines.append(_line(name, price, *(_risen(ways, name, length, density) for density in asked)))
        lines.append("")
    tasks = list(next(iter(ways.values()))[0]["found"]) if ways else []
    if not tasks:
        return "\n".join(lines[:-1])
    asked = [f"{density:g}" for density in results["settings"]["asked"]]
    lines += _head("found", *(f"{task}, {_percent(density)}" for task in tasks for density in asked))
    for name, rows in ways.items():
        lines.append(_line(name, *(_found(rows, task, density) for task in tasks for density in asked)))
    return "\n".join(lines)


def ways_of(results: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of every way to choose, a row per seed; with blocks spent in its own way, another."""
    ways: dict[str, list[Row]] = {}
    for row in results["rows"]:
        ways.setdefault(row["variant"], []).append(row)
    for name, rows in list(ways.items()):
        if own := [row["own"] for row in rows if "own" in row]:
            ways[f"{name}, {own[0]['way']}"] = own
    return ways


def risen(ways: dict[str, list[Row]], name: str, length: str, density: str) -> tuple[float, float]:
    """Return the rise of perplexity over dense attention by the seeds' mean losses, and half its interval."""
    seeds = [row["perplexity"][length][density]["losses"] for row in ways[name]]
    return rise([fmean(losses) for losses in zip(*seeds, strict=True)], _dense(ways, length))


def _dense(ways: dict[str, list[Row]], length: str) -> list[float]:
    return ways["dense"][0]["perplexity"][length]["1"]["losses"]


def _risen(ways: dict[str, list[Row]], name: str, length: str, density: str) -> str:
    if "dense" not in ways or any(density not in row["perplexity"][length] for row in ways[name]):
        return ""
    more, half = risen(ways, name, length, density)
    cell = f"{more:+.2%} ± {half:.2%}"
    if len(ways[name]) > 1:
        seeds = (row["perplexity"][length][density]["losses"] for row in ways[name])
        cell += f" ({_ends([rise(losses, _dense(ways, length))[0] for losses in seeds], '+.2%')})"
    if RIVAL in ways and (rival := risen(ways, RIVAL, length, density)[0]) > 0:
        cell += f", {more / rival:.2f}"
    cells = [row["perplexity"][length][density] for row in ways[name]]
    if "needles" in cells[0]:
        cell += f", {fmean(one['needles'] for one in cells):.0%}"
    return cell + (
        f", of {_ends([one['density'] for one in cells], '.1%')}" if "way" in ways[name][0] else ""
    )


def _found(rows: list[Row], task: str, density: str) -> str:
    cells = [row["found"][task] for row in rows]
    # Dense attention reads everything, whatever was asked.
    if not all(found := [cell.get(density) or cell.get("1") for cell in cells]):
        return ""
    shares = [one["share"] for one in found]
    spread = f" ({_ends(shares, '.0%')})" if len(shares) > 1 else ""
    return f"{fmean(shares):.0%}{spread}, {fmean(one['likelihood'] for one in found):.2f}"


def _percent(density: str) -> str:
    return f"{100 * float(density):g}%"


def _ends(values: list[float], form: str) -> str:
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _head(*titles: str) -> list[str]:
    return [_line(*titles), "|---" * len(titles) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
