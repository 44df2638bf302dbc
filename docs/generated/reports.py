"""Result files, and how a page says what they were measured with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from generated.text import Cells, Report, digits, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT / "src" / "seerattention" / "data"
POLICY = "top_k:{density},sink_blocks=1"
#: Under tables of selections by count that were measured before blocks read anyway counted.
FORMER = "Measured at commit f9ee062 or before, where a row's own block came on top of the count."
FORMER_DENSITY = f"{FORMER[:-1]}; the densities shown are as measured."


def read(*path: str, base: Path = RESULTS) -> Any:
    """Read a result file."""
    return json.loads(base.joinpath(*path).read_text())


def machine(report: Report) -> str:
    """Say what a report was measured with."""
    versions = "{device}, {threads} threads, torch {torch}, transformers {transformers}, Python {python}"
    return Cells().of(versions, report["versions"])


def attention_of(report: Report) -> str:
    """Say when, with what and on which heads something was measured."""
    return f"{report['date']}, {machine(report)}; " + Cells().of(
        "{dtype}, {heads[0]} query and {heads[1]} KV heads of {head_dim}", report
    )


def model_of(report: Report) -> str:
    """Say when, with what and on which model something was measured."""
    return f"{report['date']}, {machine(report)}; " + Cells().of(
        "shape {shape} with {layers} layers and random weights, {dtype}", report
    )


def measured_with(report: Report) -> str:
    """Say what a prefill report was measured with, and the ceilings of that run."""
    heads, limits = report["shape"], report["ceilings"]
    n = limits["matmul_size"]
    text = attention_of(report | heads | {"heads": (heads["heads"], heads["kv_heads"])}) + (
        f", batch 1; a matrix product of {n} x {n} x {n} ran at {digits(limits['matmul_tflops'])} TFLOP/s"
    )
    for name, what in (("copy_tbs", "copies"), ("l2_tbs", "reads from the L2 cache")):
        text += f", {what} at {digits(limits[name])} TB/s" if limits[name] else ""
    return text + ":"


def targets(report: Report) -> str:
    """Return what a report should reach and whether it does."""
    return table(
        "target: {what} | wanted: {sign} {bound} | reached: {reached:?~} | met: {word}",
        (
            r
            | {"sign": "at most" if r["at_most"] else "at least"}
            | {"word": {True: "yes", False: "**no**", None: "not measured"}[r["met"]]}
            for r in report["targets"]
        ),
    )
