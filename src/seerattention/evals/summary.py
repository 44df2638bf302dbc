"""What an evaluation found: one row per cell, dense first, with counts, intervals and time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from statistics import fmean, median
from typing import Any

from seerattention.evals.harness import Cell, Evaluation
from seerattention.evals.records import Record
from seerattention.files import write_whole
from seerattention.measure.intervals import mean_interval, newcombe, wilson
from seerattention.measure.versions import versions

#: What a table says about itself.
NOTE = (
    "Dense attention is the first row of every table. asked: the density that the policy was told; density: "
    "the blocks read in prefill, measured. n: samples. share: of the answers found, with Wilson's 95 % "
    "interval (a sample with several answers counts once); perplexity: with the exponential of Student's "
    "interval of the mean loss. minus dense: on the samples that both have; shares with Newcombe's interval, "
    "perplexity as the paired difference in nats per token with Student's. Seconds per sample are medians."
)


def summary_rows(cells: Iterable[Cell], records: Mapping[tuple[str, int], Record]) -> list[dict[str, Any]]:
    """Return one row per cell that has records, by task, then length, in the order of the methods."""
    dense: dict[tuple[str, int], dict[int, float]] = {}
    rows = []
    for cell in cells:
        found = [records[cell.of, seed] for seed in cell.seeds if (cell.of, seed) in records]
        if not found:
            continue
        scores = {r.seed: r.score for r in found if r.score is not None}
        same = cell.plan.label, cell.length
        if cell.method.kind == "dense":
            dense[same] = scores
        rows.append(_row(cell, found, scores, dense.get(same, {})))
    order = {label: i for i, label in enumerate(dict.fromkeys(row["task"] for row in rows))}
    return sorted(rows, key=lambda row: (order[row["task"]], row["length"]))


def _row(
    cell: Cell, found: list[Record], scores: dict[int, float], dense: dict[int, float]
) -> dict[str, Any]:
    metric, values = found[0].metric, list(scores.values())
    paired = [score - dense[seed] for seed, score in scores.items() if seed in dense]
    compared = cell.method.kind != "dense" and bool(paired)
    return {
        "task": cell.plan.label,
        "length": cell.length,
        "method": cell.method.label,
        "policy": cell.policy,
        "asked": cell.asked,
        "density": fmean(r.density for r in found),
        "samples": len(found),
        "planned": len(cell.seeds),
        "skip_below": cell.plan.skip_below,
        "metric": "share" if metric == "share" else "perplexity",
        **_estimate(metric, values),
        "minus_dense": fmean(paired) if compared else None,
        "minus_dense_interval": _difference(metric, scores, dense) if compared else None,
        "prefill_s": median(r.prefill_s for r in found),
        "seconds": median(r.seconds for r in found),
        "faults": dict(Counter(fault for r in found for fault in r.faults)),
        "by_position": _by_position(found),
    }


def _estimate(metric: str, values: list[float]) -> dict[str, Any]:
    if not values:
        return {"score": None, "interval": None}
    mean = fmean(values)
    if metric == "share":
        return {"score": mean, "interval": wilson(mean, len(values))}
    low, high = mean_interval(values)
    return {"score": math.exp(mean), "interval": _finite((low, high), math.exp)}


def _difference(metric: str, scores: dict[int, float], dense: dict[int, float]) -> tuple[float, float] | None:
    both = [seed for seed in scores if seed in dense]
    if metric == "share":
        share, other = fmean(scores[s] for s in both), fmean(dense[s] for s in both)
        return newcombe(share, len(both), other, len(both))
    return _finite(mean_interval([scores[s] - dense[s] for s in both]))


def _finite(interval: tuple[float, float], of: Any = float) -> tuple[float, float] | None:
    return (of(interval[0]), of(interval[1])) if math.isfinite(interval[1]) else None


def _by_position(found: list[Record]) -> list[tuple[int, int, float]]:
    """Return (first position, end, perplexity) of parts of the windows."""
    losses: dict[tuple[int, int], list[float]] = {}
    for record in found:
        for first, end, loss in record.by_position:
            losses.setdefault((first, end), []).append(loss)
    return [(first, end, math.exp(fmean(values))) for (first, end), values in sorted(losses.items())]


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the summary as Markdown: a table per task and length."""
    v = about["versions"]
    lines = [
        f"# {about['model']}",
        "",
        f"{about['date']}, {v['device']}, {v['threads']} threads, torch {v['torch']}, transformers "
        f"{v['transformers']}, {about['dtype']}; text: {about['text']}.",
        "",
        NOTE,
    ]
    for title, columns, part in tables(rows):
        if not any(row["faults"] for row in part):
            columns = columns[:-1]
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(cells(row)[: len(columns)])} |" for row in part]
        if len(part) == 1 and part[0]["skip_below"] and (part[0]["score"] or 0) < part[0]["skip_below"]:
            lines += ["", f"Dense attention is below {part[0]['skip_below']:.0%}, so nothing else was asked."]
        if part[0]["by_position"]:
            lines += ["", *_positions(part)]
    return "\n".join(lines) + "\n"


def tables(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[str], list[dict[str, Any]]]]:
    """Yield the title, the columns of `cells` and the rows of every task and length."""
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        part = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        columns = ["method", "asked", "density", "n", part[0]["metric"], "95 %", "minus dense"]
        yield f"{task}, {length:,} tokens", [*columns, "prefill s", "s", "faults"], part


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text, as the tables of the command line and of Markdown have it."""
    share = row["metric"] == "share"

    def number(value: float) -> str:
        return f"{value:.1%}" if share else f"{value:.3f}"

    asked = row["policy"] or "all" if row["asked"] is None else f"{row['asked']:.0%}"
    count = str(row["samples"])
    if row["samples"] < row["planned"]:
        count += f" of {row['planned']}"
    interval = row["interval"] and f"{number(row['interval'][0])} to {number(row['interval'][1])}"
    difference = ""
    if row["minus_dense"] is not None:
        difference = f"{row['minus_dense']:+.1%}" if share else f"{row['minus_dense']:+.4f}"
        if row["minus_dense_interval"]:
            low, high = row["minus_dense_interval"]
            difference += f" ({low:+.1%} to {high:+.1%})" if share else f" ± {high - row['minus_dense']:.4f}"
    return [
        row["method"],
        asked,
        f"{row['density']:.1%}",
        count,
        "" if row["score"] is None else number(row["score"]),
        interval or "",
        difference,
        f"{row['prefill_s']:.3g}",
        f"{row['seconds']:.3g}",
        ", ".join(f"{name}: {n}" for name, n in row["faults"].items()),
    ]


def _positions(rows: list[dict[str, Any]]) -> list[str]:
    parts = [(first, end) for first, end, _ in rows[0]["by_position"]]
    lines = [
        "Perplexity of the tokens at these positions:",
        "",
        f"| method | asked | {' | '.join(f'{first:,} to {end - 1:,}' for first, end in parts)} |",
        "|---" * (2 + len(parts)) + "|",
    ]
    for row in rows:
        values = {(first, end): value for first, end, value in row["by_position"]}
        shown = [f"{values[part]:.3f}" if part in values else "" for part in parts]
        lines.append(f"| {' | '.join([*cells(row)[:2], *shown])} |")
    return lines


def write_summary(evaluation: Evaluation, records: Mapping[tuple[str, int], Record]) -> list[dict[str, Any]]:
    """Write ``summary.md`` and ``summary.json`` into the evaluation's folder; return the rows."""
    config = evaluation.config
    rows = summary_rows(evaluation.cells, records)
    about = {
        "model": config.model,
        "dtype": str(evaluation.model.dtype),
        "text": ", ".join(config.text),
        "chat": config.chat,
        "date": date.today().isoformat(),
        "versions": versions(evaluation.model.device.type),
        "tasks": {p.label: {"task": p.name, **p.options} for p in config.plans},
        "methods": {m.label: {"kind": m.kind, "of": m.of, **m.options} for m in config.methods},
    }
    content = json.dumps({**about, "rows": rows}, indent=1, ensure_ascii=False, allow_nan=False)
    for name, text in (("summary.md", markdown(rows, about)), ("summary.json", content + "\n")):
        write_whole(config.out / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return rows
