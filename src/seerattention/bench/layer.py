"""A whole sparse layer and its parts: choosing blocks with a gate, then attention over them."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from torch import Tensor

from seerattention.bench.plan import Plan, Reporter
from seerattention.measure.layer import sparse_parts
from seerattention.measure.timing import interleaved, peak_mb
from seerattention.policies import TopK
from seerattention.selection import causal_blocks


def measure_layers(
    plan: Plan,
    qkv: tuple[Tensor, Tensor, Tensor],
    dense: dict[str, Callable[[], Tensor]],
    rows: list[dict[str, Any]],
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Time selection, attention and both together, per gate design and block size, beside dense attention.

    The gates' weights are random, so their selections are as scattered as random ones.

    Args:
        plan: What to measure.
        qkv: q ``[1, Hq, T, D]``, k and v ``[1, Hk, T, D]``; the gates read the same q and k.
        dense: What computes the same attention densely, by name.
        rows: What attention alone took at this length; the fastest backend is used.
        reporter: Hears about progress.

    Returns:
        One row per gate and block size.
    """
    if not plan.gates:
        return []
    tokens = qkv[0].shape[2]
    policy = TopK(plan.layer_density, sink_blocks=1)
    runs: dict[str, Callable[[], object]] = dict(dense)
    found = []
    for block in plan.blocks:
        backend = _fastest(rows, block, plan.layer_density)
        valid = causal_blocks(tokens, tokens, (block, block), plan.device)
        for name in plan.gates:
            selection, parts = sparse_parts(qkv, qkv[:2], plan.gate(name, block), policy, backend)
            runs |= {f"{name} {block} {part}": run for part, run in parts.items()}
            found.append(
                {
                    "tokens": tokens,
                    "block": block,
                    "gate": name,
                    "policy": str(policy),
                    "backend": backend,
                    "density": round(selection.density(valid), 4),
                    # The extra peak of selecting.
                    "memory_mb": round(peak_mb(parts["selection"]), 1) if qkv[0].is_cuda else None,
                }
            )
    reporter.stage(f"{tokens:,} tokens: whole layers", len(runs) * (plan.repeats + 1))
    seconds = interleaved(runs, repeats=plan.repeats, device=plan.device, after=reporter.step)
    dense_ms = min(median(seconds[name]) for name in dense) * 1e3
    for row in found:
        for part in ("selection", "attention", "total"):
            row |= in_ms(seconds[f"{row['gate']} {row['block']} {part}"], f"{part}_")
        row["dense_ms"] = round(dense_ms, 4)
        row["speedup"] = round(dense_ms / row["total_ms"], 3)
    return found


def in_ms(seconds: list[float], prefix: str = "", digits: int = 4) -> dict[str, Any]:
    """Return the median ``ms`` and ``range_ms`` of samples."""
    low, middle, high = (round(of(seconds) * 1e3, digits) for of in (min, median, max))
    return {f"{prefix}ms": middle, f"{prefix}range_ms": [low, high]}


def _fastest(rows: list[dict[str, Any]], block: int, density: float) -> str:
    """Return the backend that was fastest near a density; the op's own choice where none was measured."""
    known = [r for r in rows if r["block"] == block and r["kind"] == "backend"]
    if not known:
        return "auto"
    return min(known, key=lambda r: (abs(r["asked"] - density), r["ms"]))["backend"]
