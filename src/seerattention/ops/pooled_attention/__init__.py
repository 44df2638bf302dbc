"""Dense attention together with its map of blocks: what the gates are taught to predict."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seerattention.ops.dispatch import check_qkv, choose, load_backends, outside_autocast
from seerattention.ops.operators import FLAT, as_told, flatten, told, unflatten
from seerattention.ops.options import Pool, PoolOptions
from seerattention.rows import Rows

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order; the first two need a GPU.
ORDER = ("hopper", "triton", "chunked")


class Pooled(NamedTuple):
    """Attention and what its weights are per block.

    Attributes:
        out: The exact output, ``[B, Hq, Tq, D]``.
        target: fp32 ``[B, Hq, Nq, Nk]`` (``Hk`` maps with ``per_kv_head``), the causal softmax map pooled
            over block pairs, each row divided by its sum.
        lse: fp32 ``[B, Hq, Tq]`` (fp64 for fp64 inputs), the natural logarithm of the softmax's denominator,
            sinks included; None unless asked for.
    """

    out: Tensor
    target: Tensor
    lse: Tensor | None


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    per_kv_head: bool = False,
    pool: Pool = "max",
    return_lse: bool = False,
    rows: Rows | None = None,
    backend: str = "auto",
) -> Pooled:
    """Compute causal attention and, for every block pair, the most that a query of the one gives the other.

    Args:
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hk, Tk, D]``, ``Hk`` a divisor of ``Hq``.
        v: ``[B, Hk, Tk, D]``.
        block_size: Tokens per (query block, KV block); query blocks of one token make the target of
            decode gates.
        scale: Softmax scale; default ``D ** -0.5``.
        softcap: Scores become ``softcap * tanh(scores * scale / softcap)`` before the causal mask.
        sinks: Floating point ``[Hq]``, a logit per head that takes part in the softmax's denominator
            only; it has no place in the map.
        per_kv_head: Return one map per KV head: the largest over the heads of its group, rows
            divided by their sums after that. The maps of single heads are not written.
        pool: What a query has of a KV block: ``max``, its largest weight there, as published, or ``mass``,
            the sum of its weights there. Of a query block's queries the largest counts, in both.
        return_lse: Also return the logarithm of the softmax's denominator, sinks included.
        rows: Where the queries lie among the keys; default: they are the last of them. Later keys than the
            rows see may follow and are not read. Of packed sequences B is 1, and the map's rows are every
            sequence's ``ceil(queries / block)`` rows behind one another; its columns are blocks counted from
            each sequence's own first key, as many as the longest sequence has, 0 where a sequence has none.
            Lengths that only the device knows are read back, since they make the map's shape.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        `Pooled`. No gradient reaches q, k or v.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If shapes, devices, options or lengths do not fit, or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3.2, equation 2 (arXiv 2410.13276); per KV head, SeerAttention-R, section
    3.2 (arXiv 2506.08889).
    """
    out, target, lse = _run(
        q, k, v, block_size, backend, rows,
        scale=scale, softcap=softcap, sinks=sinks, per_kv_head=per_kv_head, pool=pool, return_lse=return_lse,
    )  # fmt: skip
    assert out is not None
    return Pooled(out, target, lse)


def pooled_map(
    q: Tensor,
    k: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    per_kv_head: bool = False,
    pool: Pool = "max",
    rows: Rows | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return only the target of `pooled_attention`, fp32 ``[B, Hq or Hk, Nq, Nk]``."""
    return _run(
        q, k, None, block_size, backend, rows,
        scale=scale, softcap=softcap, sinks=sinks, per_kv_head=per_kv_head, pool=pool,
    )[1]  # fmt: skip


@outside_autocast
def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    block_size: tuple[int, int],
    backend: str,
    rows: Rows | None,
    **asked: Any,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    check_qkv(q, k, v)
    if min(block_size) < 1:
        raise ValueError(f"block sizes must be at least one token, got {block_size}")
    options = PoolOptions.of(q, k, rows=rows, **asked)
    q, k, v = q.detach(), k.detach(), None if v is None else v.detach()
    if rows is not None:
        k, v = k[:, :, : rows.num_keys], None if v is None else v[:, :, : rows.num_keys]
    args = {"q": q, "k": k, "v": v, "block_size": block_size, "options": options}
    module = choose(BACKENDS, ORDER, backend, **args)
    if not torch.compiler.is_compiling():
        return module.run(**args)
    rest = *flatten(options), options.per_kv_head, options.pool, options.return_lse, module.__name__
    out, target, lse = _operator(q, k, v, list(block_size), *rest)
    return None if v is None else out, target, lse if options.return_lse else None


def _options(q: Tensor, k: Tensor, rest: tuple[Any, ...]) -> PoolOptions:
    *given, per_kv_head, pool, return_lse, _ = rest
    more = unflatten(q.shape[2], k.shape[2], tuple(given))
    return PoolOptions(per_kv_head=per_kv_head, pool=pool, return_lse=return_lse, **more)


@torch.library.custom_op(
    "seerattention::pooled_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor? v, int[] block_size, {FLAT}, bool per_kv_head, str pool, "
    "bool return_lse, str backend) -> (Tensor, Tensor, Tensor)",
)
def _operator(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: list[int], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    run = importlib.import_module(rest[-1]).run
    out, target, lse = run(q, k, v, (block_size[0], block_size[1]), _options(q, k, rest))
    out, lse = as_told(q, out, lse)
    return out, target.contiguous(), lse


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: list[int], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(q, k, rest)
    shape = options.map_shape(q, k, (block_size[0], block_size[1]))
    out, lse = told(q, options.return_lse)
    return q.new_empty(0) if v is None else out, q.new_empty(shape, dtype=torch.float32), lse
