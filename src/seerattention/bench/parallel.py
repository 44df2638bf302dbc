"""A prompt that processes share: a layer and its parts, and the time to the first token, beside others' ways.

Every process that a launcher started calls `measure`, and the first of them reports.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from seerattention.bench.models import SHAPES, random_config, random_model
from seerattention.bench.plan import Reporter, Setting
from seerattention.engine.call import AttentionCall, Given
from seerattention.engine.layer import Phase, SparseLayer
from seerattention.gate import AttnGate
from seerattention.gate_config import GateConfig, design_of
from seerattention.hosts.transformers import (
    ContextParallelCache,
    attach,
    cache_argument,
    detach,
    new_gates,
    prefill,
)
from seerattention.ops.dense_attention import CUDNN_FIRST, dense_attention
from seerattention.parallel.context import Context, Exchange
from seerattention.parallel.context_layer import ContextLayer
from seerattention.policies import parse
from seerattention.rows import Rows

#: Tokens that any process can take in one piece, whatever the gates' blocks.
SHORT = 8192


@dataclass(frozen=True, kw_only=True)
class ParallelPlan(Setting):
    """What a run of several processes measures.

    Attributes:
        tokens: Lengths of the prompt.
        processes: How many share it, each at most as many as there are.
        shape: Of a model of `SHAPES`.
        layers: Layers of the model whose first token is timed; 0 times attention layers alone.
        policy: How many blocks are read.
        dense: Whether dense attention is timed beside it; shared by torch's own context parallelism.
        tensor: Whether tensor parallelism over all processes is, too.
    """

    tokens: tuple[int, ...]
    processes: tuple[int, ...]
    shape: str = "llama-8b"
    layers: int = 8
    policy: str = "top_k:0.1,sink_blocks=1"
    dense: bool = True
    tensor: bool = True

    def __post_init__(self) -> None:
        self.among(shape=((self.shape,), tuple(SHAPES)))
        self.counts(tokens=self.tokens, processes=self.processes)
        if self.layers < 0:
            raise ValueError(f"layers must be at least 0, got {self.layers}")
        parse(self.policy)
        most = dist.get_world_size()
        if max(self.processes) > most:
            raise ValueError(
                f"{max(self.processes)} processes are to share a prompt and {most} were started; start more "
                "by torchrun --nproc-per-node"
            )
        super().__post_init__()


class Shared:
    """Some of the processes, which do the same and wait for one another.

    Args:
        count: How many.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, count: int, device: str) -> None:
        # Processes that are not among them take part in making the group.
        self.mesh = DeviceMesh(device, torch.arange(count), mesh_dim_names=("context",))
        self.count, self.here = count, dist.get_rank() < count
        self.cuda = device == "cuda"

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes."""
        return self.mesh.get_group()

    def seconds(self, run: Callable[[], object], repeats: int) -> list[float]:
        """Return how long calls take until the last process is done, after one that warms up."""
        found = []
        for _ in range(repeats + 1):
            dist.barrier(self.group)
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            took = torch.tensor(time.perf_counter() - start, device="cuda" if self.cuda else "cpu")
            dist.all_reduce(took, dist.ReduceOp.MAX, self.group)
            found.append(float(took))
        return found[1:]

    def peak_gb(self) -> float | None:
        """Return the most memory that this process's GPU held since it was last asked, in 2^30 bytes."""
        if not self.cuda:
            return None
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return round(peak / 2**30, 2)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def measure(plan: ParallelPlan, reporter: Reporter) -> Iterator[dict[str, Any]]:
    """Measure every length for every number of processes; yields the report so far after each."""
    report = plan.about() | {
        "benchmark": "parallel",
        "model": plan.shape,
        "model_layers": plan.layers,
        "policy": plan.policy,
        "layers": [],
        "first_tokens": [],
    }
    groups = {count: Shared(count, plan.device) for count in plan.processes}
    all_of_them = groups.get(dist.get_world_size())
    with _models(plan, tensor=plan.tensor and all_of_them is not None) as (model, split):
        for tokens in plan.tokens:
            for count, shared in groups.items():
                if shared.here:
                    reporter.stage(f"{tokens:,} tokens, {count} processes", 2)
                    report["layers"].append(_layer(plan, tokens, shared))
                    reporter.step("layer")
                    if model is not None:
                        rows = _first_tokens(plan, model, tokens, shared, reporter, "context")
                        report["first_tokens"] += rows
                    if split is not None and shared is all_of_them and count > 1:
                        rows = _first_tokens(plan, split, tokens, shared, reporter, "tensor")
                        report["first_tokens"] += rows
                    reporter.step("first token")
                dist.barrier()
            _compare(report)
            yield report


@contextmanager
def _models(plan: ParallelPlan, *, tensor: bool) -> Iterator[tuple[PreTrainedModel | None, ...]]:
    """Make the model on every process, and spread it over all of them by its own tensor parallel plan."""
    if not plan.layers:
        yield None, None
        return
    config = random_config(plan.shape, max(plan.tokens), plan.layers)
    model = random_model(config, plan.device, plan.kind)
    if not tensor:
        yield model, None
        return
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    try:
        if dist.get_rank() == 0:
            model.save_pretrained(folder[0])
        dist.barrier()
        spread = DistributedConfig(tp_size=dist.get_world_size())
        split = AutoModelForCausalLM.from_pretrained(
            folder[0], dtype=plan.kind, distributed_config=spread
        ).eval()
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
    yield model, split


def _compare(report: dict[str, Any]) -> None:
    """Say how much faster processes are than the fewest that do the same."""
    for rows, value in ((report["layers"], "ms"), (report["first_tokens"], "seconds")):
        least: dict[Any, dict[str, Any]] = {}
        for row in rows:
            first = least.setdefault((row["tokens"], row.get("way")), row)
            row["speedup"] = round(first[value] / row[value], 3)
            row["efficiency"] = round(row["speedup"] * first["processes"] / row["processes"], 3)


@torch.no_grad()
def _layer(plan: ParallelPlan, tokens: int, shared: Shared) -> dict[str, Any]:
    """Time a sparse attention layer, and each of its parts alone."""
    config = GateConfig.from_dict(
        design_of({"num_heads": plan.heads, "num_kv_heads": plan.kv_heads, "head_dim": plan.head_dim})
    )
    gate, context = plan.made(config), Context(shared.group, config.block_size, [tokens])
    context.add_piece(tokens)
    given = _inputs(plan, context.own_tokens)
    call = AttentionCall(
        0, given, Rows.last(context.own_tokens, context.own_tokens), scale=plan.head_dim**-0.5
    )
    policy, stream = parse(plan.policy), torch.cuda.Stream() if shared.cuda else None
    handler = SparseLayer(Phase({0: gate}, policy), Phase({}, None), _Never(), min_tokens=0)
    chosen: list[Any] = []
    watching = SparseLayer(
        handler.prefill, handler.decode, _Never(), min_tokens=0, observe=lambda *seen: chosen.append(seen)
    )
    ContextLayer(context).prefill(watching, call, stream)

    def attention() -> None:
        for _, part, selection in chosen:
            handler.attend(part, selection)

    def exchange() -> None:
        Exchange(context, given.k, given.v, stream).wait()

    parts: dict[str, Callable[[], object]] = {
        "": lambda: ContextLayer(context).prefill(handler, call, stream),
        "exchange_": exchange,
        "choosing_": lambda: _choose(gate, handler, context, call, chosen),
        "attention_": attention,
    }
    row: dict[str, Any] = {"tokens": tokens, "processes": shared.count}
    for name, run in parts.items():
        times = shared.seconds(run, plan.repeats)
        row[f"{name}ms"] = round(median(times) * 1e3, 4)
        row[f"{name}range_ms"] = [round(of(times) * 1e3, 4) for of in (min, max)]
    if plan.dense:
        row |= _dense_layer(plan, tokens, shared)
    row["bytes_received"] = 2 * given.k.nbytes * (shared.count - 1)
    row["peak_gb"] = shared.peak_gb()
    return row


def _choose(
    gate: AttnGate, handler: SparseLayer, context: Context, call: AttentionCall, chosen: list[Any]
) -> None:
    """Summarise, gather and choose, without attention."""
    layer = ContextLayer(context)
    layer.summarise(gate, call.given.k_nope, tail=False)
    for _, part, _ in chosen:
        handler.choose(part, gate, layer.made[gate])


def _inputs(plan: ParallelPlan, tokens: int) -> Given:
    """Return what a process has of a layer, the same numbers before RoPE and after it."""
    torch.manual_seed(dist.get_rank())
    q, k, v = (
        torch.randn(1, tokens, heads, plan.head_dim, device=plan.device, dtype=plan.kind).transpose(1, 2)
        for heads in (plan.heads, plan.kv_heads, plan.kv_heads)
    )
    return Given(q, k.contiguous(), v.contiguous(), q, k)


class _Never:
    """Rotates nothing back, since nothing is cached."""

    why_not: str | None = "nothing is cached"

    def __call__(self, layer: int, k: Tensor, positions: Tensor) -> Tensor:
        raise AssertionError(self.why_not)


@contextmanager
def _torch_context(shared: Shared, tensors: list[Tensor], dims: list[int]) -> Iterator[None]:
    """Torch's own context parallelism, which shards tensors in place while it lasts."""
    from torch.distributed.tensor.experimental import context_parallel

    with context_parallel(shared.mesh, buffers=tensors, buffer_seq_dims=dims):
        yield


def _dense_layer(plan: ParallelPlan, tokens: int, shared: Shared) -> dict[str, Any]:
    """Time dense attention: on several processes torch's ring, on one what is fastest there."""
    q, k, v, *_ = _inputs(plan, tokens)
    if shared.count == 1:
        times = shared.seconds(lambda: dense_attention(q, k, v, scale=plan.head_dim**-0.5), plan.repeats)
        return {"dense_ms": round(median(times) * 1e3, 4), "dense_why": ""}
    # The ring takes a key head for every query head.
    groups = plan.heads // plan.kv_heads
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    try:
        with _torch_context(shared, [q, k, v], [2, 2, 2]):
            times = shared.seconds(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), plan.repeats
            )
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return {"dense_ms": None, "dense_why": str(error).splitlines()[0]}
    return {"dense_ms": round(median(times) * 1e3, 4), "dense_why": ""}


@torch.no_grad()
def _first_tokens(
    plan: ParallelPlan, model: PreTrainedModel, tokens: int, shared: Shared, reporter: Reporter, by: str
) -> list[dict[str, Any]]:
    """Time the first token of a prompt, by gates and densely; ``by`` says what processes share."""
    ids = torch.arange(tokens, device=plan.device)[None] % model.config.vocab_size
    rows = []

    def row(way: str, run: Callable[[], object]) -> None:
        shared.peak_gb()
        times = shared.seconds(run, plan.repeats)
        rows.append(
            {
                "tokens": tokens,
                "processes": shared.count,
                "way": way,
                "shared": by if shared.count > 1 else "",
                "seconds": round(median(times), 4),
                "range_s": [round(of(times), 4) for of in (min, max)],
                "peak_gb": shared.peak_gb(),
            }
        )

    torch.manual_seed(0)
    attach(model, new_gates(model).to(model.dtype), plan.policy, min_tokens=0)
    cache = DynamicCache()

    def sparse() -> int:
        nonlocal cache
        alone = shared.count == 1 or by == "tensor"
        cache = DynamicCache() if alone else ContextParallelCache(model, shared.mesh)
        # A short prompt is less than a block for every chunk.
        piece = max(tokens, SHORT)
        logits = prefill(model, ids, cache, piece_tokens=piece, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def token() -> int:
        """Decode a token densely."""
        place = torch.tensor([[cache.get_seq_length()]], device=ids.device)
        logits = model(ids[:, :1], position_ids=place, **cache_argument(model, cache)).logits
        return int(logits[0, -1].argmax())

    row("gates", sparse)
    rows[-1]["next_token_ms"] = round(median(shared.seconds(token, 8 * plan.repeats)) * 1e3, 3)
    detach(model)
    if plan.dense:
        try:
            row("dense", lambda: _dense_first_token(model, ids.clone(), shared if by == "context" else None))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reporter.note(f"torch's context parallelism: {str(error).splitlines()[0]}")
    return rows


def _dense_first_token(model: PreTrainedModel, ids: Tensor, shared: Shared | None) -> int:
    """Compute a prompt densely, with a cache as generation has one."""
    inside = nullcontext() if shared is None or shared.count == 1 else _torch_context(shared, [ids], [1])
    fastest = sdpa_kernel(CUDNN_FIRST, set_priority=True) if ids.is_cuda else nullcontext()
    with inside, fastest:
        cache = cache_argument(model, DynamicCache())
        return int(model(ids, logits_to_keep=1, use_cache=True, **cache).logits[0, -1].argmax())
