"""The picture of a decode report: speedups over the best dense kernel, a group of bars per size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seerattention.measure.plot import drawn


def draw_speedups(report: dict[str, Any], path: Path) -> None:
    """Draw attention over few blocks, peers, and steps that choose their blocks.

    Args:
        report: From `seerattention.bench.decode.measure`.
        path: The picture.
    """
    shown = [r for r in report["rows"] if r["kind"] in ("attention", "peer", "step")]
    sizes = list(dict.fromkeys((r["batch"], r["tokens"]) for r in report["rows"]))
    names = list(dict.fromkeys(r["variant"] for r in shown))
    times = {(r["batch"], r["tokens"], r["variant"]): r["speedup"] for r in shown}
    title = (
        f"{report['versions']['device']}, {report['dtype']}, {report['density']:.0%} read, {report['date']}"
    )
    width = 0.8 / len(names)
    with drawn(path, title=title, figsize=(4 + 1.6 * len(sizes), 4)) as (_, axis):
        for i, name in enumerate(names):
            places = [at - 0.4 + width * (i + 0.5) for at in range(len(sizes))]
            axis.bar(places, [times.get((*size, name), 0) for size in sizes], width, label=name)
        axis.axhline(1, color="#57606a", linewidth=1)
        axis.set_xticks(range(len(sizes)), [f"{batch} x {tokens:,}" for batch, tokens in sizes])
        axis.set_ylabel("times as fast as the best dense kernel")
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        axis.grid(axis="y", alpha=0.3)
