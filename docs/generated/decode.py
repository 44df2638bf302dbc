"""docs/kernels.md: a step of decoding, of a layer and of a whole model."""

from __future__ import annotations

from generated.reports import attention_of, model_of, read, targets
from generated.text import Cells, Report, digits, parts, table


def decode() -> str:
    """Return a step of decoding beside dense decoding and peers, a column per size."""
    report = read("h200", "decode.json")
    sizes = list(dict.fromkeys((r["batch"], r["tokens"]) for r in report["rows"]))
    lines: dict[str, Report] = {}
    for r in report["rows"]:
        line = lines.setdefault(r["variant"], r | {f"at{i}": "" for i in range(len(sizes))})
        cell = "{us:~} us, {tb_s:.2f} TB/s, {speedup:.2f}x" if r["tb_s"] else "{us:~} us"
        line[f"at{sizes.index((r['batch'], r['tokens']))}"] = Cells().of(cell, r | {"us": r["ms"] * 1e3})
    shape, copy = report["shape"], digits(report["ceilings"]["copy_tbs"])
    return parts(
        f"{attention_of(report | shape | {'heads': (shape['heads'], shape['kv_heads'])})}, blocks of "
        f"{report['block']}, {report['density']:.0%} of them read; copies ran at {copy} TB/s:",
        table(
            "variant: {variant} | "
            + " | ".join(f"{b} x {n // 1024}k: {{at{i}}}" for i, (b, n) in enumerate(sizes)),
            lines.values(),
        ),
        targets(report),
        "\n".join(f"- {note}" for note in report["notes"]),
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
