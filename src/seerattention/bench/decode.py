"""A step of decoding: dense kernels, attention over few blocks, choosing them, and peers, all in one run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seerattention.bench import peers
from seerattention.bench.ceilings import ceilings
from seerattention.bench.layer import in_ms
from seerattention.bench.plan import DecodePlan, Reporter
from seerattention.measure.timing import captured, interleaved, timed
from seerattention.ops.block_sparse_decode import BACKENDS, block_sparse_decode
from seerattention.ops.select_decode_blocks import select_decode_blocks
from seerattention.ops.update_summaries import update_summaries
from seerattention.policies import TokenBudget
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection
from seerattention.testing.budget import Budget

#: Backends that are not for timing: the reference copies the cache, and on a GPU `gather` waits for the host.
NOT_TIMED = {"cpu": {"reference"}, "cuda": {"reference", "gather"}}

#: A step goes through as many layers as it takes to read this many bytes, at most so many: one layer's blocks
#: would stay in a cache that the other layers of a model push them out of.
LAYER_BYTES, MOST_LAYERS = 128 * 10**6, 8


@dataclass(frozen=True)
class Layer:
    """What a step reads in one layer; keys and values random, as many as there is room for.

    Attributes:
        q: ``[B, Hq, 1, D]``.
        k: ``[B, Hk, T, D]``.
        v: Shaped as k.
        lengths: int32 ``[B]``, ``T`` each.
        selection: Random blocks per KV head, the last one among them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    selection: BlockSelection

    @classmethod
    def draw(cls, plan: DecodePlan, batch: int, tokens: int, seed: int) -> Layer:
        """Draw one."""
        generator = torch.Generator(device=plan.device).manual_seed(seed)
        options = {"generator": generator, "device": plan.device}

        def normal(heads: int, tokens: int) -> Tensor:
            return torch.randn(batch, heads, tokens, plan.head_dim, dtype=plan.kind, **options)

        q, k, v = normal(plan.heads, 1), normal(plan.kv_heads, tokens), normal(plan.kv_heads, tokens)
        draws = torch.rand(batch, plan.kv_heads, 1, num_blocks(tokens, plan.block), **options)
        draws[..., -1] = 2
        mask = torch.zeros_like(draws, dtype=torch.bool)
        mask.scatter_(-1, draws.topk(plan.count(tokens)).indices, True)
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=plan.device)
        return cls(q, k, v, lengths, BlockSelection.from_mask(mask, (1, plan.block)))

    def everything(self) -> BlockSelection:
        """Return the selection of all blocks."""
        mask = torch.ones(1, 1, 1, self.selection.shape[3], dtype=torch.bool, device=self.q.device)
        return BlockSelection.from_mask(mask, self.selection.block_size)

    def sequence(self, b: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a sequence, ``[1, Hk, T, D]``."""
        return self.k[b : b + 1], self.v[b : b + 1]


@dataclass(frozen=True)
class Part:
    """One thing to time in one layer.

    Attributes:
        kind: ``dense``, ``attention`` over given blocks, ``peer``, ``choosing`` blocks, ``update`` of
            summaries, or ``step``, attention with choosing.
        name: Unique among the parts of a layer.
        run: Computes it.
        read: Bytes of keys, values and summaries that are read, None where that is no measure.
        selection: What the output, ``[B, Hq, 1, D]``, is attention over; None where it is none.
        sequence: Keys and values of a sequence, if they are not the layer's.
    """

    kind: str
    name: str
    run: Callable[[], Any]
    read: int | None
    selection: Callable[[], BlockSelection] | None = None
    sequence: Callable[[int], tuple[Tensor, Tensor]] | None = None


def measure(plan: DecodePlan, reporter: Reporter) -> Iterator[dict[str, Any]]:
    """Measure everything in a plan, one size after another.

    Args:
        plan: What to measure.
        reporter: Hears about progress and about what is left out.

    Yields:
        The report so far after every size, plain JSON types; docs/kernels.md explains its fields.

    Raises:
        ModuleNotFoundError: If a peer is not installed.
        ValueError: If an output is outside the error budget; nothing of that size was timed then.
    """
    extra = {name: peer_of(name, plan.device) for name in plan.extra}
    dense = peers.dense_peers(plan.device, list(plan.peers), peers.dense_step)
    notes: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)
            reporter.note(text)

    reporter.stage("ceilings of the device", 1)
    with torch.inference_mode():
        limits = ceilings(plan.device, plan.kind)
        report = plan.about() | {"block": plan.block, "density": plan.density, "ceilings": limits}
        report |= {"notes": notes, "rows": []}
        for batch, tokens in plan.sizes:
            per_layer = 2 * batch * plan.kv_heads * plan.count(tokens) * plan.block * plan.head_dim
            count = min(MOST_LAYERS, -(-LAYER_BYTES // (per_layer * plan.kind.itemsize)))
            layers = [Layer.draw(plan, batch, tokens, seed) for seed in range(count)]
            parts = list(zip(*(_parts(plan, layer, dense, extra) for layer in layers), strict=True))
            found = _rows(plan, layers[0], parts, reporter, note)
            report["rows"] += found
            yield report
            # Before the next ones are drawn.
            del layers, parts


def peer_of(name: str, device: str) -> Callable[..., Callable[[], Tensor]]:
    """Return what makes a peer's call for q, k, v and a selection.

    Raises:
        ModuleNotFoundError: If it is not installed.
        ValueError: If it cannot run on this device, or its name cannot be read.
    """
    if name != "flashinfer":
        peer = peers.load(name)
        return lambda *args: partial(peer, *args)
    if device == "cpu":
        raise ValueError("peer flashinfer runs on GPUs alone, and this run is on the CPU")
    if importlib.util.find_spec("flashinfer") is None:
        raise ModuleNotFoundError("peer flashinfer is not installed; pip install flashinfer-python")
    return peers.flashinfer


def _parts(
    plan: DecodePlan, layer: Layer, dense: dict[str, Callable[..., Tensor]], extra: dict[str, Any]
) -> list[Part]:
    """Return what is timed in a layer, dense kernels first."""
    q, k, v, lengths, selection = layer.q, layer.k, layer.v, layer.lengths, layer.selection
    whole = k.nbytes + v.nbytes
    few = int(selection.counts.sum()) * plan.block * plan.head_dim * 2 * plan.kind.itemsize
    parts = [
        Part("dense", name, partial(run, q, k, v), whole, layer.everything) for name, run in dense.items()
    ]
    attend = partial(block_sparse_decode, q, lengths=lengths)
    for name in (name for name in BACKENDS if name not in NOT_TIMED[plan.device]):
        run = partial(attend, k, v, selection, backend=name)
        parts.append(Part("attention", name, run, few, lambda: selection))
        for page in plan.pages:
            count, shape = len(k) * k.shape[2] // page, (-1, plan.kv_heads, page, plan.head_dim)
            table = torch.randperm(count, device=k.device).to(torch.int32).view(len(k), -1)
            paged = [x.view(shape) for x in (k, v)]
            run = partial(attend, *paged, selection, pages=table, backend=name)

            def sequence(b: int, paged: Any = paged, table: Tensor = table) -> Any:
                return tuple(x[table[b]].transpose(0, 1).flatten(1, 2)[None] for x in paged)

            parts.append(Part("attention", f"{name}, pages of {page}", run, few, lambda: selection, sequence))
    for name, make in extra.items():
        parts.append(Part("peer", name, make(q, k, v, selection), few, lambda: selection))
    for gate in plan.gates:
        parts += _chosen(plan, layer, gate, few)
    return parts


def _chosen(plan: DecodePlan, layer: Layer, name: str, few: int) -> list[Part]:
    """Return the parts of a step that chooses its blocks; keys and queries are the layer's."""
    tokens, scorer = layer.k.shape[2], plan.scorer(name)
    policy = TokenBudget(plan.count(tokens) * plan.block)
    summaries = scorer.compress(layer.k, positions=torch.arange(tokens, device=layer.k.device))
    tail, key = (layer.k[:, :, -size:].clone() for size in (plan.block, 1))
    read, before = summaries.nbytes, layer.lengths - 1

    def update(lengths: Tensor = layer.lengths) -> None:
        update_summaries(summaries, tail, key, scorer, lengths=lengths)

    def choose() -> BlockSelection:
        return select_decode_blocks(
            layer.q, summaries, scorer, policy, lengths=layer.lengths, num_keys=tokens, kv_heads=plan.kv_heads
        )

    def attend() -> Any:
        return block_sparse_decode(layer.q, layer.k, layer.v, choose(), lengths=layer.lengths)

    def everything() -> Any:
        # The last key finishes a block: the most that there is to do.
        update()
        return attend()

    return [
        Part("update", f"update, {name}", lambda: update(before), None),
        Part("update", f"update that finishes a block, {name}", update, None),
        Part("choosing", f"choosing, {name}", choose, read),
        Part("step", f"with choosing, {name}", attend, few + read, choose),
        Part("step", f"with update and choosing, {name}", everything, few + read, choose),
    ]


def _rows(
    plan: DecodePlan,
    layer: Layer,
    parts: list[tuple[Part, ...]],
    reporter: Reporter,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Check and time the parts of one size, each in all layers; dense ones first."""
    batch, tokens = len(layer.k), layer.k.shape[2]
    size = f"{batch} x {tokens:,} tokens"
    reporter.stage(f"{size}: first calls, checked against the reference", len(parts))
    first_ms: dict[str, float] = {}
    running: list[tuple[Part, ...]] = []
    for of_layers in parts:
        part = of_layers[0]
        try:
            first_ms[part.name] = _first_call(layer, part, size)
            if layer.q.is_cuda and captured(part.run) is None:
                note(f"{part.name} waits for the host: timed without a CUDA graph")
            running.append(of_layers)
        except NotImplementedError as error:
            note(f"left out: {str(error).split('because')[-1].strip()}")
        reporter.step(part.name)
    if not any(part.kind == "dense" for part, *_ in running):
        raise ValueError(f"no dense kernel runs at {size} here; name another as a peer")

    def through(of_layers: tuple[Part, ...]) -> None:
        for part in of_layers:
            part.run()

    reporter.stage(f"{size}: timing", len(running) * (plan.repeats + 1))
    runs = {of_layers[0].name: partial(through, of_layers) for of_layers in running}
    seconds = interleaved(runs, repeats=plan.repeats, device=plan.device, after=reporter.step)
    rows = []
    for part, *rest in running:
        times = in_ms([sample / (1 + len(rest)) for sample in seconds[part.name]], digits=5)
        row = {"batch": batch, "tokens": tokens, "kind": part.kind, "variant": part.name, **times}
        row["first_ms"] = round(first_ms[part.name], 1)
        row["tb_s"] = part.read and float(f"{part.read / row['ms'] / 1e9:.4g}")
        rows.append(row)
    dense_ms = min(row["ms"] for row in rows if row["kind"] == "dense")
    for row in rows:
        row |= {"speedup": round(dense_ms / row["ms"], 3), "share_of_dense": round(row["ms"] / dense_ms, 4)}
    return rows


def _first_call(layer: Layer, part: Part, size: str) -> float:
    """Run a part once and check what it returns; return the milliseconds of the call."""
    out, seconds = timed(part.run)
    if part.selection is not None:
        try:
            check_sequences(layer, part.selection(), out, part.sequence or layer.sequence)
        except AssertionError as error:
            raise ValueError(f"{part.name} is wrong at {size} and is not timed: {error}") from error
    return seconds * 1e3


def check_sequences(
    layer: Layer, selection: BlockSelection, out: Tensor, sequence: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    """Check the first and the last sequence of an output against the reference.

    Args:
        layer: Whose queries and lengths count.
        selection: What was read.
        out: ``[B, Hq, 1, D]``, or the same numbers in another shape.
        sequence: Keys and values of a sequence.

    Raises:
        AssertionError: If the output is outside the error budget.
    """
    assert out.numel() == layer.q.numel(), f"shape {list(out.shape)}, not {list(layer.q.shape)}"
    for b in sorted({0, len(layer.q) - 1}):
        of = slice(b, b + 1) if len(selection.bits) > 1 else slice(None)
        own = BlockSelection(selection.bits[of], (1, *selection.shape[1:]), selection.block_size)

        def reference(q: Tensor, k: Tensor, v: Tensor, own: BlockSelection = own) -> Any:
            return block_sparse_decode(q, k, v, own, backend="reference")

        budget = Budget.of(reference, layer.q[b : b + 1], *sequence(b))
        budget.check(out.reshape(layer.q.shape)[b : b + 1])
