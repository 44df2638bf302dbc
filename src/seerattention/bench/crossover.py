"""From reports to an entry of the crossover table: where dense attention is faster."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from seerattention.ops.block_sparse_attention import ORDER

#: A prompt or a step is computed sparsely if this share of its blocks can be read faster than everything.
WORTHWHILE = 0.1

#: Layers of a model: planning a new length once is paid back by all of them.
LAYERS = 32


def entry_of(report: dict[str, Any], gate: str, block: int) -> dict[str, Any]:
    """Derive where dense attention beats selection plus sparse attention.

    Args:
        report: From `seerattention.bench.prefill.measure`, with random masks at several densities,
            ``WORTHWHILE`` and 1 among them.
        gate: Whose selection counts.
        block: Tokens per block.

    Returns:
        The entry, with the times it was derived from.

    Raises:
        ValueError: If the report lacks what is needed.
    """
    rows = [r for r in report["rows"] if (r["kind"], r["block"]) == ("backend", block)]
    rows = [r for r in rows if r["mask"] in ("full", "random")]
    chosen = {r["tokens"]: r for r in report["layers"] if (r["gate"], r["block"]) == (gate, block)}
    if not rows or not chosen:
        raise ValueError(
            f"the report has no selection of gate {gate!r} with random masks in blocks of {block}"
        )
    measured = {r["backend"] for r in rows}
    # What ``auto`` takes, or else the fastest.
    used = [name for name in ORDER if name in measured]
    backend = used[0] if used else min(rows, key=lambda r: r["ms"])["backend"]
    rows = [r for r in rows if r["backend"] == backend]
    found = [
        _length(report, [r for r in rows if r["tokens"] == tokens], chosen[tokens])
        for tokens in sorted(chosen)
    ]
    return {
        "device": report["versions"]["device"],
        **{
            name: report[name] for name in ("device_type", "capability", "versions", "date", "dtype", "shape")
        },
        "block": block,
        "gate": gate,
        "backend": backend,
        "dense_below": _dense_below(found),
        "cudnn_from": _cudnn_from(report),
        "rows": found,
    }


def decode_of(report: dict[str, Any], gate: str) -> dict[str, Any]:
    """Derive below how many cached tokens a dense step of decoding is faster, for one sequence.

    Args:
        report: From `seerattention.bench.decode.measure`, with ``WORTHWHILE`` as its density.
        gate: Whose choosing and whose summaries count.

    Returns:
        What an entry says of decoding, with the times it was derived from.

    Raises:
        ValueError: If the report lacks what is needed.
    """
    rows = [r for r in report["rows"] if r["batch"] == 1]
    steps = {r["tokens"]: r["ms"] for r in rows if r["variant"] == f"with update and choosing, {gate}"}
    if not steps or report["density"] != WORTHWHILE:
        raise ValueError(
            f"the report has no steps of one sequence by gate {gate!r} that read {WORTHWHILE:.0%} of it"
        )
    found = []
    for tokens in sorted(steps):
        of_length = (r for r in rows if r["kind"] == "dense" and r["tokens"] == tokens)
        dense = min(of_length, key=lambda r: r["ms"])
        row = {"tokens": tokens, "dense": dense["variant"], "dense_ms": dense["ms"], "step_ms": steps[tokens]}
        found.append(row | {"worthwhile": steps[tokens] < dense["ms"]})
    return {
        "device": report["versions"]["device"],
        "device_type": report["device_type"],
        "decode_dense_below": _dense_below(found),
        "decode_gate": gate,
        "decode_rows": found,
    }


def extended(entries: list[dict[str, Any]], part: dict[str, Any]) -> dict[str, Any]:
    """Return a table's entry of a device with what was derived anew.

    Raises:
        ValueError: If nothing is known of prefill.
    """
    name = part["device_type"], part["device"]
    entry = next((e for e in entries if (e["device_type"], e["device"]) == name), {}) | part
    if "rows" not in entry:
        raise ValueError(f"the table has no entry of {part['device']} yet; measure prefill, too")
    return entry


def merged(entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a table with an entry added in place of its device's and of guesses for its type."""
    gone = [(entry["device_type"], device) for device in (None, entry["device"])]
    kept = [e for e in entries if (e["device_type"], e["device"]) not in gone]
    return sorted([*kept, entry], key=lambda e: (e["device_type"], e["device"] or ""))


def _length(report: dict[str, Any], rows: list[dict[str, Any]], layer: dict[str, Any]) -> dict[str, Any]:
    tokens = layer["tokens"]
    dense = min(
        (r for r in report["rows"] if r["kind"] == "dense" and r["tokens"] == tokens), key=lambda r: r["ms"]
    )
    times = sorted((r["density"], r["ms"]) for r in rows)
    worthwhile = [r["ms"] for r in rows if r["asked"] == WORTHWHILE]
    if not worthwhile:
        raise ValueError(f"the report has no density of {WORTHWHILE} at {tokens} tokens")
    return {
        "tokens": tokens,
        "dense": dense["backend"],
        "dense_ms": dense["ms"],
        "selection_ms": layer["selection_ms"],
        "attention_ms": [list(pair) for pair in times],
        "worthwhile": layer["selection_ms"] + worthwhile[0] < dense["ms"],
        "densest": _densest(times, dense["ms"] - layer["selection_ms"]),
    }


def _densest(times: list[tuple[float, float]], budget_ms: float) -> float:
    """Return the density up to which attention stays within a time, by interpolation; 0 if never."""
    if times[-1][1] < budget_ms:
        return 1.0
    if times[0][1] >= budget_ms:
        # From the origin: half the work takes about half the time.
        return round(max(0.0, times[0][0] * budget_ms / times[0][1]), 3)
    after = next(i for i, (_, ms) in enumerate(times) if ms >= budget_ms)
    (low, low_ms), (high, high_ms) = times[after - 1], times[after]
    return round(low + (high - low) * (budget_ms - low_ms) / (high_ms - low_ms), 3)


def _dense_below(found: list[dict[str, Any]]) -> int:
    """Return the shortest length from which on sparse attention always won."""
    won = list(takewhile(lambda row: row["worthwhile"], reversed(found)))
    return won[-1]["tokens"] if won else 2 * found[-1]["tokens"]


def _cudnn_from(report: dict[str, Any]) -> int | None:
    """Return the shortest length from which on cuDNN's first call is paid back within one prompt."""
    times = {(r["tokens"], r["backend"]): r for r in report["rows"] if r["kind"] == "dense"}
    best = None
    for tokens in sorted({tokens for tokens, _ in times}, reverse=True):
        cudnn, fa2 = times.get((tokens, "dense cudnn")), times.get((tokens, "dense fa2"))
        if cudnn is None or fa2 is None or (fa2["ms"] - cudnn["ms"]) * LAYERS < cudnn["first_ms"]:
            break
        best = tokens
    return best
