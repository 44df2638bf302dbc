"""Result files, and how a page says what they were measured with."""

from __future__ import annotations

import json
import runpy
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


def read_all(pattern: str) -> list[Report]:
    """Read the result files that a pattern matches, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def experiment(name: str) -> dict[str, Any]:
    """Return what the table of an experiment is made with: its functions by their names."""
    return runpy.run_path(str(ROOT / "experiments" / name / "table.py"))


def machine(report: Report) -> str:
    """Say what a report was measured with."""
    versions = "{device}, {threads} threads, torch {torch}, transformers {transformers}, Python {python}"
    return Cells().of(versions, report["versions"])


def dated(report: Report) -> str:
    """Say when and with what something was measured."""
    return f"{report['date']}, {machine(report)}"


def attention_of(report: Report) -> str:
    """Say when, with what and on which heads something was measured."""
    heads = "{dtype}, {heads[0]} query and {heads[1]} KV heads of {head_dim}"
    return f"{dated(report)}; {Cells().of(heads, report)}"


def shape_of(report: Report) -> str:
    """Say when, with what and on which heads a benchmark measured, whose settings are in its shape."""
    shape = report["shape"]
    return attention_of(report | shape | {"heads": (shape["heads"], shape["kv_heads"])})


def model_of(report: Report) -> str:
    """Say when, with what and on which model something was measured."""
    model = "shape {shape} with {layers} layers and random weights, {dtype}"
    return f"{dated(report)}; {Cells().of(model, report)}"


def measured_with(report: Report) -> str:
    """Say what a prefill report was measured with, and the ceilings of that run."""
    limits = report["ceilings"]
    n, rate = limits["matmul_size"], digits(limits["matmul_tflops"])
    text = f"{shape_of(report)}, batch 1; a matrix product of {n} x {n} x {n} ran at {rate} TFLOP/s"
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


def notes(report: Report) -> str:
    """Return what a report notes, as a list."""
    return "\n".join(f"- {note}" for note in report["notes"])
