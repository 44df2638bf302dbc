"""Draw the time of a layer's attention per token against the tokens in its cache.

python docs/decode.py, after seerattention bench decode wrote its results.
"""

from __future__ import annotations

import json
from pathlib import Path

from seerattention.files import write_whole
from seerattention.measure.plot import COLOURS, drawn

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "decode.json"
FIGURE = ROOT / "docs" / "figures" / "decode-h200.png"
VARIANTS = {"dense cudnn": COLOURS["dense"], "with choosing, default": COLOURS["gate"]}


def draw(path: Path) -> None:
    """Draw a line per batch that was measured at several lengths, and a mark for every other."""
    report = json.loads(RESULTS.read_text())
    title = f"{report['versions']['device']}, {report['density']:.0%} of the cache read, {report['date']}"
    marks = dict(zip(sorted({r["batch"] for r in report["rows"]}), "os^D", strict=False))
    with drawn(path, title=title, figsize=(7, 4)) as (_, axis):
        for variant, colour in VARIANTS.items():
            for batch, mark in marks.items():
                rows = [r for r in report["rows"] if (r["variant"], r["batch"]) == (variant, batch)]
                points = sorted((r["tokens"], 1e3 * r["ms"]) for r in rows)
                label = f"{variant.removesuffix(', default')}, {batch} sequence{'s' if batch > 1 else ''}"
                axis.plot(*zip(*points, strict=True), f"{mark}-", color=colour, markersize=5, label=label)
        ticks = sorted({r["tokens"] for r in report["rows"]})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        axis.minorticks_off()
        axis.set_xlabel("tokens in the cache of a sequence")
        axis.set_ylabel("us per step of a layer")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def main() -> None:
    """Write the picture."""
    write_whole(FIGURE, draw)
    print(FIGURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
