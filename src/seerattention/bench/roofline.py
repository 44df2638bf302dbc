"""The picture of a prefill report: rate over selected work against density, under its ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seerattention.bench.ceilings import l2_tflops
from seerattention.measure.plot import COLOURS, drawn

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
STYLES = {"random": "o-", "group": "D-.", "gate": "s--", "band": "^:"}


def draw_roofline(report: dict[str, Any], path: Path) -> None:
    """Draw one panel per length and block size: a line per backend and mask.

    Args:
        report: From `seerattention.bench.prefill.measure`.
        path: The picture.
    """
    blocks = sorted({r["block"] for r in report["rows"] if r["block"]})
    lengths = sorted({r["tokens"] for r in report["rows"]})
    names = sorted({r["backend"] for r in report["rows"] if r["kind"] != "dense"})
    title = f"{report['versions']['device']}, {report['dtype']}, {report['date']}"
    size = 4.6 * len(lengths), 3.9 * len(blocks)
    grid = drawn(path, len(blocks), len(lengths), title=title, figsize=size, sharey=True, squeeze=False)
    with grid as (_, axes):
        for row, block in zip(axes, blocks, strict=True):
            for axis, tokens in zip(row, lengths, strict=True):
                if any(r["tokens"] == tokens and r["block"] == block for r in report["rows"]):
                    _panel(axis, report, tokens, block, names)
                else:
                    axis.set_axis_off()
            row[0].set_ylabel("TFLOP/s over selected work")
        for axis in axes[-1]:
            axis.set_xlabel("density: fraction of blocks read")
        axes[0][0].legend(fontsize=7)


def _panel(axis: Any, report: dict[str, Any], tokens: int, block: int, names: list[str]) -> None:
    rows = [r for r in report["rows"] if r["tokens"] == tokens]
    limits = report["ceilings"]
    axis.axhline(limits["matmul_tflops"], color="#57606a", linewidth=1, label="matrix product")
    if limits["l2_tbs"]:
        rate = l2_tflops(limits["l2_tbs"], block, ELEMENT_SIZES[report["dtype"]])
        # Far above the matrix rate it limits nothing and would flatten the picture.
        if rate < 2 * limits["matmul_tflops"]:
            axis.axhline(
                rate, color="#9a6700", linewidth=1, linestyle="-.", label="L2 reads (sums), no sharing"
            )
    for dense, style in zip((r for r in rows if r["kind"] == "dense"), ("--", ":"), strict=False):
        axis.axhline(
            dense["tflops"], color=COLOURS["dense"], linestyle=style, linewidth=1, label=dense["backend"]
        )
    for colour, name in enumerate(names):
        whole = [r for r in rows if (r["backend"], r["block"], r["mask"]) == (name, block, "full")]
        for mask, style in STYLES.items():
            line = [r for r in rows if (r["backend"], r["block"], r["mask"]) == (name, block, mask)]
            if line:
                line = sorted(line + whole, key=lambda r: r["density"])
                points = [r["density"] for r in line], [r["tflops"] for r in line]
                axis.plot(*points, style, color=f"C{colour}", markersize=4, label=f"{name}, {mask}")
    axis.set_xscale("log")
    ticks = sorted({r["asked"] for r in rows if r["block"] == block})
    axis.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_title(f"{tokens:,} tokens, blocks of {block}")
    axis.grid(alpha=0.3)
