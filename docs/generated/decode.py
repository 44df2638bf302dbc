"""docs/kernels.md: a step of decoding, of a layer and of a whole model."""

from __future__ import annotations

from generated.reports import model_of, notes, read, shape_of, targets
from generated.text import Cells, Report, digits, parts, table, under


def decode() -> str:
    """Return a step of decoding beside dense decoding and peers, a column per size."""
    report = read("h200", "decode.json")
    sizes = list(dict.fromkeys((r["batch"], r["tokens"]) for r in report["rows"]))
    lines: dict[str, Report] = {}
    for r in report["rows"]:
        line = lines.setdefault(r["variant"], r | {"at": [""] * len(sizes)})
        cell = "{us:~} us, {tb_s:.2f} TB/s, {speedup:.2f}x" if r["tb_s"] else "{us:~} us"
        line["at"][sizes.index((r["batch"], r["tokens"]))] = Cells().of(cell, r | {"us": r["ms"] * 1e3})
    copy = digits(report["ceilings"]["copy_tbs"])
    return parts(
        f"{shape_of(report)}, blocks of {report['block']}, {report['density']:.0%} of them read; "
        f"copies ran at {copy} TB/s:",
        table(
            "variant: {variant} | " + under(f"{b} x {n // 1024}k" for b, n in sizes),
            lines.values(),
        ),
        targets(report),
        notes(report),
    )


def decode_step() -> str:
    """Return a whole model's step, dense and sparse."""
    report = read("h200", "decode_step.json")
    return parts(
        f"A whole step, {model_of(report)}, {report['density']:.0%} of the cache read:",
        table(
            "batch: {batch} | cached tokens: {tokens:,} | method: {method} | how: {how} | ms: {ms:.2f} | "
            "range ms: {range_ms[0]:.2f}-{range_ms[1]:.2f} | tokens/s: {tokens_per_s:,.0f} | "
            "speedup: {speedup:.2f}x",
            report["rows"],
        ),
    )
