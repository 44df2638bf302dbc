"""docs/kernels.md, docs/lab and docs/method.md: what training costs, and what joint training reaches."""

from __future__ import annotations

from generated.reports import FORMER, attention_of, dated, experiment, model_of, read, read_all
from generated.text import parts, table


def backward() -> str:
    """Return forward and backward beside dense attention's, and the parts alone."""
    report = read("h200", "block_sparse_backward.json")
    return parts(
        f"{attention_of(report)}, blocks of {report['block']}, {report['density']:.0%} of the earlier blocks "
        "at random:",
        table(
            "tokens: {tokens:,} | what: {variant} | median ms: {ms:.3f} | "
            "range ms: {range_ms[0]:.3f}-{range_ms[1]:.3f} | TFLOP/s: {tflops:?} | speedup: {times} | "
            "peak MB: {peak_mb:?}",
            (r | {"times": f"{r['speedup']:.2f}x" if r["speedup"] else ""} for r in report["rows"]),
        ),
    )


def backward_sweep() -> str:
    """Return the launches of the backward that were tried."""
    report = read("h100", "block_sparse_backward_sweep.json")
    launches = table("part, 32k: {part} | launch: `{launch}` | ms: {ms:.3f}", report["sweep"])
    return parts(f"{dated(report)}:", launches)


def pooled() -> str:
    """Return attention with its map beside dense attention on a GPU."""
    report = read("h200", "pooled_attention.json")
    columns = (
        "tokens: {tokens:,} | what: {variant} | ms: {ms:~} | range: {range_ms[0]:~}-{range_ms[1]:~} | "
        "over dense: {times_dense:.2f}x | MB beyond the outputs: {extra_mb:.0f}"
    )
    return parts(f"{attention_of(report)}:", table(columns, report["rows"]))


def distill_step() -> str:
    """Return the cost of a training step beside the dense forward pass."""
    report = read("h200", "distill_step.json")
    columns = (
        "tokens: {tokens:,} | dense forward s: {forward_s:.2f} | step s: {step_s:.2f} | ratio: {ratio:.2f} | "
        "pooled attention s: {parts_s[pooled attention]:.2f} | gate s: {parts_s[gate]:.2f} | "
        "optimizer s: {parts_s[optimizer]:.3f} | rest s: {parts_s[rest]:.2f} | "
        "forward peak GB: {forward_peak_gb:.1f} | step peak GB: {step_peak_gb:.1f} | "
        "GPU hours for 0.5 B tokens: {row[gpu_hours_per_0.5b_tokens]:.1f}"
    )
    return parts(f"{model_of(report)}, one sequence per step:", table(columns, report["rows"]))


def yarn() -> str:
    """Return the context extension: dense, with gates afterwards, jointly with them."""
    made = experiment("yarn")
    shown = made["table"](read("h200", "yarn", "lr-1e-3.json"))
    return parts(shown, made["learning_rates"](read_all("h200/yarn/lr-*.json")), FORMER)
