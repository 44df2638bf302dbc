"""The results of `experiments.approximate.run` as Markdown.

python -m experiments.approximate.table runs/approximate/ranking.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

Layers = dict[str, dict[str, Any]]


def table(results: dict[str, Any]) -> str:
    """Return a line per way: products, and by density what is kept of the exact choice and its attention.

    A cell is the share of the exact way's blocks that are chosen too, of those that are a choice; the
    attention in all blocks read, relative to the exact way's; and that without the blocks read anyway.
    """
    layers: Layers = results["layers"]
    densities = [f"{x:g}" for x in results["settings"]["densities"]]
    lines = [_line("way", "products", *(f"{float(x):.0%}" for x in densities))]
    lines.append("|---" * (2 + len(densities)) + "|")
    for name in next(iter(layers.values())):
        products = fmean(layer[name]["products"] for layer in layers.values())
        lines.append(_line(name, f"{products:.2f}", *(_cell(layers, name, x) for x in densities)))
    return "\n".join(lines)


def relative(layers: Layers, name: str, density: str) -> tuple[float, float, float]:
    """Return what a way keeps of the exact one's blocks, of its attention, and of that of choices."""
    cells = [(layer[name][density], layer["exact"][density]) for layer in layers.values()]
    kept = sum(own["kept"] for own, _ in cells) / sum(own["of"] for own, _ in cells)
    mass, free = (sum(own[x] for own, _ in cells) / sum(e[x] for _, e in cells) for x in ("mass", "free"))
    return kept, mass, free


def _cell(layers: Layers, name: str, density: str) -> str:
    if not any(layer[name][density]["of"] for layer in layers.values()):
        return "no choice"
    kept, mass, free = relative(layers, name, density)
    return f"{kept:.1%}, {mass:.2%}, {free:.1%}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
