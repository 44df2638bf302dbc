"""Prefill attention: dense kernels, sparse backends and peers at one selection, all in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.bench import masks, peers
from seerattention.bench.ceilings import ceilings
from seerattention.bench.layer import in_ms, measure_layers
from seerattention.bench.plan import Plan, Reporter
from seerattention.measure.timing import interleaved, timed
from seerattention.ops import block_sparse_attention as op
from seerattention.rows import Rows
from seerattention.selection import BlockSelection, causal_blocks
from seerattention.testing.budget import Budget

#: Backends that are not for timing: the reference computes the dense map whatever the density, and on a
#: GPU `gather` waits for the host in every call and FlexAttention is a peer, its lists made beforehand.
NOT_TIMED = {"cpu": {"reference"}, "cuda": {"reference", "gather", "flex"}}

#: Query blocks of an output that are compared with the reference, and the longest sequence to do it at.
CHECKED_ROWS, CHECKED_TOKENS = 3, 32768


@dataclass(frozen=True)
class Variant:
    """One thing to time at one length.

    Attributes:
        kind: ``dense``, ``backend`` (this package's), ``paged`` (the same with keys in pages) or ``peer``.
        backend: Its name.
        selection: What it reads.
        mask: How the selection was made; ``full`` for everything.
        asked: The density asked for.
        run: Computes the output, ``[1, Hq, T, D]``.
    """

    kind: str
    backend: str
    selection: BlockSelection
    mask: str
    asked: float
    run: Callable[[], Tensor]

    @property
    def name(self) -> str:
        """Unique among the variants of a length."""
        return f"{self.backend} {self.mask} {self.selection.block_size[1]} {self.asked}"


def measure(plan: Plan, reporter: Reporter) -> Iterator[dict[str, Any]]:
    """Measure everything in a plan, one length after another.

    Args:
        plan: What to measure.
        reporter: Hears about progress and about what is left out.

    Yields:
        The report so far after every length, plain JSON types; docs/kernels.md explains its fields.

    Raises:
        ValueError: If an output is outside the error budget; nothing of that length was timed then.
    """
    extra = {name: peers.load(name) for name in plan.extra}
    dense = peers.dense_peers(plan.device, list(plan.peers))
    notes: list[str] = []

    def note(text: str) -> None:
        # The same reason holds at every density: said once.
        if text not in notes:
            notes.append(text)
            reporter.note(text)

    reporter.stage("ceilings of the device", 1)
    with torch.inference_mode():
        limits = ceilings(plan.device, plan.kind)
        makers: dict[str, Callable[..., BlockSelection]] = {
            "random": masks.random,
            "group": masks.group,
            "band": masks.band,
        }
        if "gate" in plan.masks and any(density < 1 for density in plan.densities):
            reporter.stage(f"scores of the bundled gates on {plan.teacher_tokens:,} tokens of text", 1)
            scores = masks.teacher_scores(plan.device, plan.teacher_tokens)
            makers["gate"] = partial(masks.gate, scores=scores)
        report = plan.about() | {"ceilings": limits, "notes": notes, "rows": [], "layers": []}
        for tokens in plan.tokens:
            q, k, v = _draw(plan, tokens)
            paged = {page: _in_pages(k, v, page) for page in plan.pages}
            size = plan.blocks[0], plan.blocks[0]
            everything = BlockSelection.full(Rows.last(tokens, tokens), size, plan.device)
            variants = [
                Variant("dense", name, everything, "full", 1.0, partial(peer, q, k, v, everything))
                for name, peer in dense.items()
            ]
            for block in plan.blocks:
                shape = plan.shape(tokens, block)
                selections = [
                    (mask, density, makers[mask](shape, density, plan.device))
                    for mask in plan.masks
                    for density in plan.densities
                    if density < 1
                ]
                if 1.0 in plan.densities:
                    selections.insert(0, ("full", 1.0, masks.full(shape, plan.device)))
                for mask, asked, selection in selections:
                    variants += _sparse_variants(plan, extra, (q, k, v), paged, mask, asked, selection, note)
            found = _rows(plan, (q, k, v), variants, reporter, note)
            for row in found:
                row["share_of_matmul"] = round(row["tflops"] / (limits["matmul_tflops"] or 1), 3)
            report["rows"] += found
            ran = {row["backend"] for row in found}
            whole = {v.backend: v.run for v in variants if v.kind == "dense" and v.backend in ran}
            report["layers"] += measure_layers(plan, (q, k, v), whole, found, reporter)
            yield report


def _draw(plan: Plan, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw normal q, k and v on the device: the host takes many seconds for 128k tokens."""
    generator = torch.Generator(device=plan.device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = (1, heads, tokens, plan.head_dim)
        return torch.randn(size, generator=generator, device=plan.device, dtype=plan.kind)

    return draw(plan.heads), draw(plan.kv_heads), draw(plan.kv_heads)


def _in_pages(k: Tensor, v: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay keys and values of a sequence out in pages, in any order and side by side, as engines do.

    Returns:
        Both ``[P, Hk, page, D]``, and the block table ``[1, P]``.
    """
    both = F.pad(torch.cat([k, v], -1)[0], (0, 0, 0, -k.shape[2] % page))
    both = both.unflatten(1, (-1, page)).transpose(0, 1)
    order = torch.randperm(len(both), device=k.device)
    keys, values = both[order.argsort()].split(k.shape[3], -1)
    return keys, values, order.to(torch.int32)[None]


def _sparse_variants(
    plan: Plan,
    extra: dict[str, peers.Peer],
    qkv: tuple[Tensor, Tensor, Tensor],
    paged: dict[int, tuple[Tensor, Tensor, Tensor]],
    mask: str,
    asked: float,
    selection: BlockSelection,
    note: Callable[[str], None],
) -> list[Variant]:
    """Return every backend and peer at one selection; what cannot take part is noted."""
    found = []

    def add(kind: str, name: str, run: Callable[[], Tensor]) -> None:
        found.append(Variant(kind, name, selection, mask, asked, run))

    for name in op.BACKENDS:
        if name not in NOT_TIMED[plan.device]:
            add("backend", name, partial(op.block_sparse_attention, *qkv, selection, backend=name))
            rows = Rows.last(qkv[0].shape[2], qkv[0].shape[2])
            for page, (k, v, table) in paged.items():
                attend = partial(op.block_sparse_attention, rows=rows, pages=table, backend=name)
                add("paged", f"{name}, pages of {page}", partial(attend, qkv[0], k, v, selection))
    if "flex" in plan.peers and plan.device == "cuda":
        size = 2 * 4 * plan.heads * math.prod(selection.shape[2:])
        if size > peers.FLEX_BYTES:
            note(
                f"flex left out at {qkv[0].shape[2]:,} tokens in blocks of {selection.block_size[1]}: its "
                f"lists would take {size / 2**20:,.0f} MB each"
            )
        else:
            add("peer", "flex", partial(peers.flex(qkv[0], qkv[1], selection), *qkv, selection))
    for name, peer in extra.items():
        add("peer", name, partial(peer, *qkv, selection))
    return found


def _rows(
    plan: Plan,
    qkv: tuple[Tensor, Tensor, Tensor],
    variants: list[Variant],
    reporter: Reporter,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Check and time the variants of one length; dense ones first."""
    tokens = qkv[0].shape[2]
    reporter.stage(f"{tokens:,} tokens: first calls, checked against the reference", len(variants))
    first_ms: dict[str, float] = {}
    running: list[Variant] = []
    for variant in variants:
        try:
            first_ms[variant.name] = _first_call(qkv, variant)
            running.append(variant)
        except NotImplementedError as error:
            note(f"left out: {str(error).split('because')[-1].strip()}")
        reporter.step(variant.name)
    if not any(v.kind == "dense" for v in running):
        raise ValueError(f"no dense kernel runs at {tokens:,} tokens here; name another as a peer")
    reporter.stage(f"{tokens:,} tokens: timing", len(running) * (plan.repeats + 1))
    runs = {variant.name: variant.run for variant in running}
    seconds = interleaved(runs, repeats=plan.repeats, device=plan.device, after=reporter.step)
    dense_ms = min(median(seconds[v.name]) * 1e3 for v in running if v.kind == "dense")
    return [_row(plan, tokens, v, seconds[v.name], first_ms[v.name], dense_ms) for v in running]


def _first_call(qkv: tuple[Tensor, Tensor, Tensor], variant: Variant) -> float:
    """Run a variant once and check what it returns; return the milliseconds of the call."""
    tokens = qkv[0].shape[2]
    out, seconds = timed(variant.run)
    if tokens <= CHECKED_TOKENS:
        try:
            check_rows(qkv, variant.selection, out)
        except AssertionError as error:
            raise ValueError(
                f"{variant.name} is wrong at {tokens:,} tokens and is not timed: {error}"
            ) from error
    return seconds * 1e3


def check_rows(qkv: tuple[Tensor, Tensor, Tensor], selection: BlockSelection, out: Tensor) -> None:
    """Check the first, the last and a middle query block of an output against the reference.

    Args:
        qkv: q ``[1, Hq, T, D]``, k and v ``[1, Hk, T, D]``.
        selection: What was read.
        out: ``[1, Hq, T, D]``.

    Raises:
        AssertionError: If the output is outside the error budget.
    """
    (q, k, v), size = qkv, selection.block_size
    assert out.shape == q.shape, f"shape {list(out.shape)}, not {list(q.shape)}"
    rows = torch.linspace(0, selection.shape[2] - 1, CHECKED_ROWS).int().tolist()
    for row in sorted(set(rows)):
        start, end = row * size[0], min((row + 1) * size[0], q.shape[2])
        shape = (1, selection.shape[1], 1, selection.shape[3])
        line = BlockSelection(selection.bits[:, :, row : row + 1], shape, size).to_mask()
        seen = BlockSelection.from_mask(line[..., : -(-end // size[1])], size)

        def reference(q: Tensor, k: Tensor, v: Tensor, seen: BlockSelection = seen) -> Tensor:
            return op.block_sparse_attention(q, k, v, seen, backend="reference")

        budget = Budget.of(reference, q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        budget.check(out[:, :, start:end])


def causal_pairs(selection: BlockSelection, tokens: int) -> int:
    """Count the (query, key) pairs of a prefill selection: own blocks are triangles, others whole.

    Args:
        selection: ``[B, H, N, N]`` with square blocks.
        tokens: Query and key tokens.

    Returns:
        The pairs of all its heads.
    """
    size, nq = selection.block_size[0], selection.shape[2]
    counts = selection.counts.sum((0, 1), dtype=torch.int64).cpu()
    lists = selection.shape[0] * selection.shape[1]
    queries = torch.full((nq,), size)
    queries[-1] = tokens - (nq - 1) * size
    return int(((counts - lists) * queries * size + lists * (queries * (queries + 1) // 2)).sum())


def _row(
    plan: Plan, tokens: int, variant: Variant, times: list[float], first_ms: float, dense_ms: float
) -> dict[str, Any]:
    selection, ms = variant.selection, median(times) * 1e3
    valid = causal_blocks(tokens, tokens, selection.block_size, plan.device)
    pairs = causal_pairs(selection, tokens) * plan.heads // selection.shape[1]
    return {
        "tokens": tokens,
        "block": None if variant.kind == "dense" else selection.block_size[1],
        "mask": variant.mask,
        "kind": variant.kind,
        "backend": variant.backend,
        "asked": variant.asked,
        "density": round(selection.density(valid), 4),
        **in_ms(times),
        "first_ms": round(first_ms, 1),
        # Two products of 2 * D FLOPs for every pair of tokens.
        "tflops": float(f"{4 * plan.head_dim * pairs / ms / 1e9:.6g}"),
        "speedup": round(dense_ms / ms, 3),
    }
