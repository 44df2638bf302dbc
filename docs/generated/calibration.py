"""docs/method.md: what calibrated thresholds meet and lose."""

from __future__ import annotations

from generated.reports import FORMER_DENSITY, machine, read
from generated.text import Report, parts, table, under


def targets() -> str:
    """Return what calibrated thresholds do at half, once and twice the length they were calibrated at."""
    report = read("cpu", "calibrate.json")
    on, dense = report["calibrated_on"], report["dense"]

    def cell(row: Report) -> str:
        rise = row["perplexity"] / dense[str(row["tokens"])] - 1
        return f"{row['density']:.1%}, {row['recall']:.1%}, {rise:+.1%}"

    return parts(
        f"{on['windows']} windows of {on['tokens']:,} tokens to calibrate on, {report['held_out_tokens']:,} "
        f"others to measure on; {machine(report)}. A cell is density, recall and the rise of perplexity over "
        "dense:",
        table(
            "target: {target} {value:.0%} | " + under(f"{int(n):,} tokens" for n in dense),
            (target | {"at": list(map(cell, target["rows"]))} for target in report["targets"]),
        ),
    )


def compared() -> str:
    """Return calibrated thresholds, one threshold and top-k at equal measured density."""
    report = read("cpu", "calibrate.json")
    tokens = report["calibrated_on"]["tokens"]
    rows = []
    for entry in sorted(report["compared"], key=lambda e: -e["density"]):
        names = ("calibrated", "one threshold", "top-k", "top-k")
        rows += [{"name": name} | row for name, row in zip(names, entry["rows"], strict=False)]
        mine, _, *top_k = entry["rows"]
        if len(top_k) == 2:
            low, high = top_k
            part = (mine["density"] - low["density"]) / (high["density"] - low["density"])
            line = {k: low[k] + part * (high[k] - low[k]) for k in ("density", "recall", "perplexity")}
            rows.append({"name": "top-k, the line between"} | line)
    exponents = (
        f"{r['row_exponent']:g}: {r['perplexity']:.2f} at {r['density']:.1%}" for r in report["row_exponents"]
    )
    return parts(
        f"At {tokens:,} tokens, the density measured; dense has a perplexity of "
        f"{report['dense'][str(tokens)]:.2f}:",
        table(
            "policy: {name} | density: {density:.2%} | recall: {recall:.1%} | perplexity: {perplexity:.2f}",
            rows,
        ),
        FORMER_DENSITY,
        f"With other exponents of `n`, for a density of 10 %: {', '.join(exponents)}.",
    )
