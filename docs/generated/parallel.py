"""docs/kernels.md: prompts and steps of distillation that several GPUs share."""

from __future__ import annotations

from typing import Any

from generated.reports import dated, read
from generated.text import Report, parts, table


def parallel() -> str:
    """Return how long processes take that share a prompt, and what a step of distillation takes there."""
    report, longer = read("h200", "parallel.json"), read("h200", "parallel_512k.json")
    about = (
        f"{dated(report)}, one process per GPU, NCCL over NVLink; shape "
        f"{report['model']} with random weights, {report['dtype']}, `{report['policy']}`, the default gate. "
        "A layer by wall time, launches included, and its parts alone; dense by cuDNN on one "
        "GPU, by torch's ring on two:"
    )
    columns = (
        "tokens: {tokens:,} | GPUs: {processes} | layer ms: {ms:.1f} | over one: {over} | choosing ms: "
        "{choosing_ms:.1f} | exchange ms: {exchange_ms:.2f} | attention ms: {attention_ms:.1f} | dense ms: "
        "{dense_ms:.1f}"
    )
    alone = {row["tokens"]: row["ms"] for row in report["layers"] if row["processes"] == 1}
    layers = [
        row | {"over": f"{alone[row['tokens']] / row['ms']:.2f}x" if row["tokens"] in alone else ""}
        for row in (*report["layers"], *longer["layers"])
    ]
    shared = read("h200", "distill_step_shared.json")
    steps = (
        "tokens: {tokens:,} | GPUs: {processes} | forward s: {forward_s:.2f} | step s: {step_s:.2f} | "
        "ratio: {ratio:.2f} | forward peak GB: {forward_peak_gb:.1f} | step peak GB: {step_peak_gb:.1f}"
    )
    return parts(
        about,
        table(columns, layers),
        f"The first token, with embedding and head ({report['model_layers']} layers; "
        f"{longer['model_layers']} at 524,288 tokens). GPUs share the prompt, dense by torch's "
        "own context parallelism, or the heads:",
        _first_tokens([*report["first_tokens"], *longer["first_tokens"]]),
        f"A step of distillation of {shared['layers']} layers on a sequence that GPUs share, beside its "
        "forward pass:",
        table(steps, shared["rows"]),
    )


def _first_tokens(measured: list[Report]) -> str:
    """Return first tokens: by gates beside dense, on one GPU and on several."""
    rows: dict[Any, Report] = {}
    for row in measured:
        rows.setdefault((row["tokens"], row["processes"], row["shared"]), {})[row["way"]] = row
    shown = []
    for (tokens, _, shared), ways in rows.items():
        gates, dense = ways["gates"], ways["dense"]
        alone = rows.get((tokens, 1, ""))
        shown.append(
            gates
            | {"shared": {"context": "the prompt", "tensor": "the heads", "": ""}[shared]}
            | {"over": f"{alone['gates']['seconds'] / gates['seconds']:.2f}x" if alone else ""}
            | {"dense": dense["seconds"], "gain": dense["seconds"] / gates["seconds"]}
        )
    return table(
        "tokens: {tokens:,} | GPUs: {processes} | they share: {shared} | gates s: {seconds:.3f} | "
        "over one GPU: {over} | dense s: {dense:.3f} | gates over dense: {gain:.2f}x | "
        "peak GB: {peak_gb:.1f}",
        shown,
    )
