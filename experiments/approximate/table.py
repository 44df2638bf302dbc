"""The results of `experiments.approximate.run` as Markdown.

python -m experiments.approximate.table runs/approximate/ranking.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from seerattention.measure.intervals import rise

Report = dict[str, Any]


def table(reports: list[Report]) -> str:
    """Return a line per way, a column per model and density.

    A cell of a ranking is the share of the exact way's blocks that are chosen too, of those that are a
    choice; the attention in all blocks read, relative to the exact way's; and that without the blocks read
    anyway. Of perplexity it is the rise over dense attention, the rise over the exact way with its 95 %
    interval over the windows, and, where they were asked for, the share of numbers found.
    """
    return ranking(reports) if "ways" in reports[0] else quality(reports)


def ranking(reports: list[Report]) -> str:
    """Return which of the exact way's blocks are chosen."""
    names = dict.fromkeys(name for one in reports for name in one["ways"])
    lines = _head(reports, "way", "products")
    for name in names:
        cells = [_ranked(one["ways"], name, x) for one in reports for x in _densities(one)]
        products = [one["ways"][name]["products"] for one in reports if name in one["ways"]]
        lines.append(_line(name, f"{fmean(products):.2f}", *cells))
    return "\n".join(lines)


def relative(ways: Report, name: str, density: str) -> tuple[float, float, float]:
    """Return what a way keeps of the exact one's blocks, of its attention, and of that of choices."""
    own, best = ways[name][density], ways["exact"][density]
    return own["kept"] / own["of"], own["mass"] / best["mass"], own["free"] / best["free"]


def _ranked(ways: Report, name: str, density: str) -> str:
    if name not in ways:
        return ""
    if not ways[name][density]["of"]:
        return "no choice"
    kept, mass, free = relative(ways, name, density)
    return f"{kept:.1%}, {mass:.2%}, {free:.1%}"


def quality(reports: list[Report]) -> str:
    """Return perplexity and numbers found."""
    names = dict.fromkeys(name for one in reports for name in one["rows"])
    lines = _head(reports, "way")
    for name in names:
        cells = [_lost(one["rows"], name, x) for one in reports for x in _densities(one)]
        lines.append(_line(name, *cells))
    return "\n".join(lines)


def _lost(rows: dict[str, Report], name: str, density: str) -> str:
    at = "1" if name == "dense" else density
    if at not in rows.get(name, {}).get("perplexity", {}):
        return ""
    own, dense = rows[name]["perplexity"][at], rows["dense"]["perplexity"]["1"]
    exact = rows.get("exact", {"perplexity": {}})["perplexity"].get(density)
    said = [] if name == "dense" else [f"{rise(own['losses'], dense['losses'])[0]:+.2%}"]
    if exact is not None and name not in ("dense", "exact"):
        more, half = rise(own["losses"], exact["losses"])
        said.append(f"{more:+.2%} ± {half:.2%}")
    shares = [own["needles"]] if "needles" in own else []
    shares += [cells[at]["share"] for cells in rows[name]["found"].values() if at in cells]
    return ", ".join([*said, *(f"{share:.0%}" for share in shares)])


def _densities(report: Report) -> list[str]:
    return [f"{x:g}" for x in report["settings"]["densities"]]


def _head(reports: list[Report], *first: str) -> list[str]:
    cells = [
        f"{one['settings']['model']}, {one['settings']['window']:,} tokens, {float(x):.0%}"
        for one in reports
        for x in _densities(one)
    ]
    return [_line(*first, *cells), "|---" * (len(first) + len(cells)) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
