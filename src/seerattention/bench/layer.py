"""A whole sparse layer and its parts: choosing blocks with a gate, then attention over them."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from seerattention.attention import select_blocks
from seerattention.bench.peers import Peer
from seerattention.bench.plan import Plan, Reporter
from seerattention.gate import AttnGate
from seerattention.measure.timing import interleaved, peak_mb
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.policies import Policy, TopK
from seerattention.rows import Rows
from seerattention.selection import BlockSelection, causal_blocks


def measure_layers(
    plan: Plan,
    qkv: tuple[Tensor, Tensor, Tensor],
    dense: dict[str, Peer],
    rows: list[dict[str, Any]],
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Time selection, attention and both together, per gate design and block size, beside dense attention.

    The gates' weights are random, so their selections are as scattered as random ones.

    Args:
        plan: What to measure.
        qkv: q ``[1, Hq, T, D]``, k and v ``[1, Hk, T, D]``; the gates read the same q and k.
        dense: The dense kernels.
        rows: What attention alone took at this length; the fastest backend is used.
        reporter: Hears about progress.

    Returns:
        One row per gate and block size.
    """
    if not plan.gates:
        return []
    tokens = qkv[0].shape[2]
    policy = TopK(plan.layer_density, sink_blocks=1)
    runs: dict[str, Callable[[], object]] = {}
    size = plan.blocks[0], plan.blocks[0]
    everything = BlockSelection.full(Rows.last(tokens, tokens), size, plan.device)
    dense = {name: peer for name, peer in dense.items() if name in {row["backend"] for row in rows}}
    for name, peer in dense.items():
        runs[name] = lambda peer=peer: peer(*qkv, everything)
    found = []
    for block in plan.blocks:
        backend = _fastest(rows, block, plan.layer_density)
        valid = causal_blocks(tokens, tokens, (block, block), plan.device)
        for name in plan.gates:
            layer = _Layer(qkv, plan.gate(name, block), policy, backend)
            selection, memory = layer.measured_selection()
            key = f"{name} {block}"
            runs[f"{key} selection"] = layer.choose
            runs[f"{key} attention"] = lambda layer=layer, selection=selection: layer.attend(selection)
            runs[f"{key} total"] = layer.whole
            found.append(
                {
                    "tokens": tokens,
                    "block": block,
                    "gate": name,
                    "policy": str(policy),
                    "backend": backend,
                    "density": round(selection.density(valid), 4),
                    "memory_mb": memory,
                }
            )
    reporter.stage(f"{tokens:,} tokens: whole layers", len(runs) * (plan.repeats + 1))
    seconds = interleaved(runs, repeats=plan.repeats, device=plan.device, after=reporter.step)
    dense_ms = min(median(seconds[name]) for name in dense) * 1e3
    for row in found:
        for part in ("selection", "attention", "total"):
            times = seconds[f"{row['gate']} {row['block']} {part}"]
            row[f"{part}_ms"] = round(median(times) * 1e3, 4)
            row[f"{part}_range_ms"] = [round(min(times) * 1e3, 4), round(max(times) * 1e3, 4)]
        row["dense_ms"] = round(dense_ms, 4)
        row["speedup"] = round(dense_ms / row["total_ms"], 3)
    return found


class _Layer:
    """What one attention layer does in a sparse prefill."""

    def __init__(
        self, qkv: tuple[Tensor, Tensor, Tensor], gate: AttnGate, policy: Policy, backend: str
    ) -> None:
        self.q, self.k, self.v = qkv
        self.gate, self.policy, self.backend = gate, policy, backend
        self.positions = torch.arange(self.q.shape[2], device=self.q.device)

    def choose(self) -> BlockSelection:
        """Pool, score and select."""
        k_blocks = self.gate.compress(self.k, positions=self.positions)
        return select_blocks(
            self.q,
            k_blocks,
            self.gate,
            self.policy,
            positions=self.positions,
            rows=Rows.last(self.q.shape[2], self.k.shape[2]),
        )

    def attend(self, selection: BlockSelection) -> Tensor:
        """Compute attention over the selection."""
        return block_sparse_attention(self.q, self.k, self.v, selection, backend=self.backend)

    def whole(self) -> Tensor:
        """Select, then attend."""
        return self.attend(self.choose())

    def measured_selection(self) -> tuple[BlockSelection, float | None]:
        """Return the selection and the extra peak memory of making it in MB, None on a CPU."""
        selection = self.choose()
        return selection, round(peak_mb(self.choose), 1) if self.q.is_cuda else None


def _fastest(rows: list[dict[str, Any]], block: int, density: float) -> str:
    """Return the backend that was fastest near a density; the op's own choice where none was measured."""
    known = [r for r in rows if r["block"] == block and r["kind"] == "backend"]
    if not known:
        return "auto"
    return min(known, key=lambda r: (abs(r["asked"] - density), r["ms"]))["backend"]
