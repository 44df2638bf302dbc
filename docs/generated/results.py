"""docs/results.md: the bundled model by length and method, and the short tables of GPUs and decoding."""

from __future__ import annotations

from generated.reports import (
    DATA,
    FORMER_DENSITY,
    POLICY,
    dated,
    experiment,
    machine,
    measured_with,
    read,
    read_all,
)
from generated.text import Cells, Report, parts, table


def quality() -> str:
    """Return the demo's comparison, dense first."""
    report = read("cpu", "demo.json")
    tokens = report["rows"][0]["tokens"]
    return parts(
        f"At {tokens:,} tokens; {report['questions']} needle questions; {machine(report)}:",
        table(
            "method: {method} | density: {density:.1%} | perplexity: {perplexity:.2f} | "
            "needles: {needle:.0%} | needles, last rows dense: {needle_dense_last:.0%} | "
            "recall: {recall:.1%} | prefill s: {prefill_s:.2f} | speedup: {speedup:.2f}x",
            report["rows"],
        ),
    )


def times() -> str:
    """Return the demo's time curve."""
    rows = read("cpu", "demo.json")["lengths"]
    for r in rows:
        r["with"] = r["dense_attention_s"] / (r["sparse_attention_s"] + r["selection_s"])
        r |= {f"{k}_ms": r[f"{k}_s"] * 1e3 for k in ("dense_attention", "sparse_attention", "selection")}
    return table(
        "tokens: {tokens:,} | model dense s: {dense_prefill_s:.2f} | "
        "model sparse s: {sparse_prefill_s:.2f} | speedup: {prefill_speedup:.2f}x | "
        "one layer's attention dense ms: {dense_attention_ms:.0f} | sparse ms: {sparse_attention_ms:.0f} | "
        "selecting blocks ms: {selection_ms:.0f} | attention speedup: {attention_speedup:.1f}x | "
        "with selecting: {with:.1f}x",
        rows,
    )


def lengths() -> str:
    """Return the bundled gates' evaluation at several lengths, dense first."""
    columns = (
        "tokens: {tokens:,} | method: {method} | density: {density:.1%} | perplexity: {perplexity:.2f} | "
        "needles: {needle:.0%} of {questions}"
    )
    return table(columns, read("teacher-gates", "results.json", base=DATA))


def table_of_all() -> str:
    """Return every method at every density and length, dense first."""
    report = read("h100", "eval", "summary.json")
    rows = {(r["task"], r["length"], r["method"], r["asked"]): r for r in report["rows"]}
    lengths = sorted({n for _, n, *_ in rows})
    (count,) = {r["samples"] for r in rows.values()}
    others = [r["device"] for r in rows.values() if "device" in r]

    def widest(task: str, relative: bool) -> float:
        found = (r for r in rows.values() if r["task"] == task)
        return max((r["interval"][1] - r["interval"][0]) / 2 / (r["score"] if relative else 1) for r in found)

    def line(method: str, asked: float | None) -> Report:
        cells = {
            f"at{n}": Cells().of("{density:.0%}, {score:.2f}", rows["perplexity", n, method, asked])
            + f", {rows['needle', n, method, asked]['score']:.0%}"
            for n in lengths
        }
        name = f"**{method}**" if method in ("dense", "gates") else method
        return {"name": name, "asked": "all" if asked is None else f"{asked:.0%}", **cells}

    return parts(
        f"{dated(report)}, {report['dtype'].removeprefix('torch.')}; `{POLICY}`, no "
        f"dense last rows; {count} samples a cell, of eight needles each. 95 % intervals are at most "
        f"± {widest('needle', False):.0%} of needles and ± {widest('perplexity', True):.1%} of a perplexity; "
        "the latter is mostly the spread of the texts, which is the same for every method. "
        f"{len(others)} of {len(rows)} figures are from an {', '.join(sorted(set(others)))}. What was "
        "measured on both cards was the same.",
        table(
            "method: {name} | blocks asked: {asked} | "
            + " | ".join(f"{n // 1024}k (read, perplexity, needles): {{at{n}}}" for n in lengths),
            (line(*key) for key in dict.fromkeys((m, a) for _, _, m, a in rows)),
        ),
        FORMER_DENSITY,
    )


def gpu_short() -> str:
    """Return a GPU's attention at 10 % and everything read, per length and block size; dense first."""
    report = read("h200", "prefill.json")
    by = {(r["backend"], r["tokens"], r["block"], r["mask"], r["asked"]): r for r in report["rows"]}
    dense = {r["tokens"]: r for r in report["rows"] if r["backend"] == "dense cudnn"}
    return parts(
        measured_with(report),
        table(
            "tokens: {tokens:,} | block: {block} | blocks read: {what} | cuDNN dense ms: {dense[ms]:~} | "
            "`hopper` ms: {ms:~} | speedup: {speedup:.2f}x | `triton` ms: {triton[ms]:~} | "
            "speedup: {triton[speedup]:.2f}x",
            (
                r
                | {"what": "all" if r["mask"] == "full" else Cells().of("{mask}, {density:.1%}", r)}
                | {"dense": dense[r["tokens"]], "triton": by["triton", *key]}
                for (backend, *key), r in by.items()
                if backend == "hopper" and tuple(key[2:]) in (("full", 1.0), ("random", 0.1), ("gate", 0.1))
            ),
        ),
    )


def decode_quality() -> str:
    """Return what decoding loses by reading less."""
    return experiment("decoding")["tables"](read_all("*/decode_quality*.json"))
