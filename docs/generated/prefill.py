"""docs/kernels.md and docs/support.md: prefill on CPUs and GPUs, and from where on it is sparse."""

from __future__ import annotations

from typing import Any

from generated.reports import DATA, measured_with, model_of, notes, read, targets
from generated.text import Cells, Report, parts, table, under


def native() -> str:
    """Return the benchmark of the compiled kernel, and a layer with selecting, in both dtypes."""
    return "\n\n".join(
        parts(bench(f"prefill_native_{dtype}.json"), layers(read("cpu", f"layer_native_{dtype}.json")))
        for dtype in ("bfloat16", "float32")
    )


def bench(name: str = "prefill.json") -> str:
    """Return a prefill benchmark on a CPU, dense first at every length."""
    report = read("cpu", name)
    columns = (
        "tokens: {tokens:,} | block: {block:?} | mask: {mask} | backend: {backend} | "
        "density: {density:.1%} | median ms: {ms:.1f} | range ms: {range_ms[0]:.1f}-{range_ms[1]:.1f} | "
        "TFLOP/s: {tflops:.3f} | of the matrix rate: {share_of_matmul:.0%} | speedup: {speedup:.2f}x"
    )
    whole = layers(report) if report["layers"] else ""
    return parts(measured_with(report), table(columns, report["rows"]), whole, "\n".join(report["notes"]))


def layers(report: Report) -> str:
    """Return whole layers of a report."""
    return table(
        "tokens: {tokens:,} | block: {block} | gate: {gate} | density: {density:.1%} | "
        "selection ms: {selection_ms:~} | attention ms: {attention_ms:~} | together ms: {total_ms:~} | "
        "dense ms: {dense_ms:~} | speedup: {speedup:.2f}x | extra MB: {memory_mb:?~}",
        report["layers"],
    )


def pages() -> str:
    """Return prefill over keys in pages beside keys that lie behind one another, on a GPU."""
    report = read("h200", "prefill_pages.json")
    columns = (
        "tokens: {tokens:,} | block: {block:?} | backend: {backend} | density: {density:.1%} | "
        "median ms: {ms:~} | range ms: {range_ms[0]:~}-{range_ms[1]:~} | speedup: {speedup:.2f}x"
    )
    return parts(measured_with(report), table(columns, report["rows"]))


def gpu() -> str:
    """Return what was measured on a GPU: picture, attention, layers, targets, whole model."""
    report = read("h200", "prefill.json")
    return parts(
        "![Rate against density under the device's ceilings](figures/prefill-h200.png)",
        measured_with(report),
        by_density(report),
        layers(report),
        targets(report),
        notes(report),
        end_to_end(),
    )


def peers() -> str:
    """Return other libraries' kernels on equal masks, and layers over the best dense kernel, on a GPU."""
    runs = (read("h200", name) for name in ("layers.json", "layers_128.json"))
    earlier = read("h200", "peers.json")
    kept = ("dense cudnn", "dense fa4", "flex", "flashinfer")
    return parts(
        *(part for report in runs for part in (equal_masks(report), layers(report))),
        "FlexAttention and FlashInfer, " + equal_masks(earlier, kept),
    )


def equal_masks(report: Report, kept: tuple[str, ...] | None = None) -> str:
    """Return kernels on equal masks, all or those kept: times, and over dense cuDNN and FlashAttention-4."""
    sizes = sorted({r["tokens"] for r in report["rows"]})
    dense = {(r["tokens"], r["backend"]): r["ms"] for r in report["rows"] if r["kind"] == "dense"}
    lines: dict[tuple[Any, ...], Report] = {}
    for r in report["rows"]:
        if kept is not None and r["backend"] not in kept:
            continue
        short = r["backend"].rpartition(":")[2]
        cells = {"backend": short, "at": [""] * len(sizes)}
        line = lines.setdefault((r["block"], r["mask"], short), r | cells)
        over = {name: dense[r["tokens"], f"dense {name}"] / r["ms"] for name in ("cudnn", "fa4")}
        cell = Cells().of("{ms:~} ms, {over[cudnn]:.2f}x, {over[fa4]:.2f}x", r | {"over": over})
        line["at"][sizes.index(r["tokens"])] = cell
    return parts(
        measured_with(report),
        table(
            "block: {block:?} | mask: {mask} | kernel: {backend} | " + under(f"{n:,}" for n in sizes),
            lines.values(),
        ),
    )


def by_density(report: Report) -> str:
    """Return attention alone, one line per backend, one column per density asked for."""
    asked = sorted({r["asked"] for r in report["rows"]}, reverse=True)
    lines: dict[tuple[Any, ...], Report] = {}
    for r in report["rows"]:
        key = r["tokens"], r["block"], r["mask"], r["backend"]
        line = lines.setdefault(key, r | {"at": [""] * len(asked)})
        cell = Cells().of("{ms:~} ms, {tflops:~} TFLOP/s, {speedup:.2f}x", r)
        line["at"][asked.index(r["asked"])] = cell
    return table(
        "tokens: {tokens:,} | block: {block:?} | mask: {mask} | backend: {backend} | "
        + under(f"{a:.0%}" for a in asked),
        lines.values(),
    )


def end_to_end() -> str:
    """Return the time to the first token and its parts."""
    report = read("h200", "end_to_end.json")
    return parts(
        f"Time to the first token, {model_of(report)}, `{report['policy']}`:",
        table(
            "tokens: {tokens:,} | method: {method} | first token s: {first_token_s:.2f} | "
            "speedup: {speedup:.2f}x | "
            + "".join(f"{p} s: {{parts_s[{p}]:.2f}} | " for p in report["rows"][0]["parts_s"])
            + "peak GB: {peak_gb:?}",
            report["rows"],
        ),
    )


def crossover() -> str:
    """Return up to which density sparse prefill is faster, per device and length."""
    texts = []
    for entry in read("crossover.json", base=DATA):
        if entry["device"] is None:
            guess = (
                "On a {device_type} device no table was measured yet: prefill is dense below "
                "{dense_below:,} tokens, a cautious guess."
            )
            texts.append(Cells().of(guess, entry))
            continue
        measured = (
            "{device}, {date}, torch {versions[torch]}, {dtype}, `{backend}`, {gate} gate, "
            "blocks of {block}: dense below {dense_below:,} tokens."
        )
        columns = (
            "tokens: {tokens:,} | fastest dense: {dense} | dense ms: {dense_ms:~} | "
            "selection ms: {selection_ms:~} | sparse is faster up to density: {densest:.0%}"
        )
        texts += [Cells().of(measured, entry), table(columns, entry["rows"])]
        if "decode_rows" in entry:
            below = (
                "Steps of decoding one sequence, {decode_gate} gate: dense below {decode_dense_below:,} "
                "cached tokens."
            )
            steps = (
                "cached tokens: {tokens:,} | fastest dense: {dense} | dense us: {dense_us:~} | "
                "sparse us, choosing and summaries included: {step_us:~}"
            )
            rows = [
                r | {f"{k}_us": r[f"{k}_ms"] * 1e3 for k in ("dense", "step")} for r in entry["decode_rows"]
            ]
            texts += [Cells().of(below, entry), table(steps, rows)]
    return parts(*texts)


def dense_below() -> str:
    """Return from which length prefill is sparse, per device."""
    below = ", ".join(
        f"{e['dense_below']:,} tokens on {e['device'] or 'a ' + e['device_type'] + ' device (a guess)'}"
        for e in read("crossover.json", base=DATA)
    )
    return (
        "- Shorter prompts than this are prefilled densely, since selecting costs more than it saves:\n"
        f"  {below}; `min_tokens=` changes it."
    )
