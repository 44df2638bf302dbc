"""Draw the time per token of a whole model against the tokens in its cache.

python docs/decode.py, after benchmarks/decode_step.py wrote its results.
"""

from __future__ import annotations

import json
from pathlib import Path

from seerattention.files import write_whole
from seerattention.measure.plot import COLOURS, drawn

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "decode_step.json"
FIGURE = ROOT / "docs" / "figures" / "decode-step-h200.png"
METHODS = {"dense, sdpa": COLOURS["other"], "dense, best kernel": COLOURS["dense"], "sparse": COLOURS["gate"]}


def draw(path: Path) -> None:
    """Draw a line per way to decode one sequence, and a mark for every larger batch."""
    report = json.loads(RESULTS.read_text())
    device, density = report["versions"]["device"], report["density"]
    title = f"{report['shape']}, {device}, {density:.0%} of the cache read, {report['date']}"
    with drawn(path, title=title, figsize=(7, 4)) as (_, axis):
        for method, colour in METHODS.items():
            rows = [r for r in report["rows"] if r["method"] == method]
            for batch in sorted({r["batch"] for r in rows}):
                points = [(r["tokens"], r["ms"]) for r in rows if r["batch"] == batch]
                style = "o-" if batch == 1 else "s"
                label = f"{method}, {batch} sequence{'s' if batch > 1 else ''}"
                axis.plot(*zip(*points, strict=True), style, color=colour, markersize=5, label=label)
        ticks = sorted({r["tokens"] for r in report["rows"]})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        axis.minorticks_off()
        axis.set_xlabel("tokens in the cache of a sequence")
        axis.set_ylabel("ms per step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def main() -> None:
    """Write the picture."""
    write_whole(FIGURE, draw)
    print(FIGURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
