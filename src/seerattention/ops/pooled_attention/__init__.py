"""Dense attention together with its block-max-pooled map: what the gates are taught to predict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

from torch import Tensor

from seerattention.ops.dispatch import check_qkv, choose, load_backends
from seerattention.ops.pooled_attention._options import PoolOptions, read_lengths

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order; the first two need a GPU.
ORDER = ("hopper", "triton", "chunked")


@overload
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
    return_lse: Literal[False] = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
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
    return_lse: Literal[True],
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...


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
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Compute causal attention and, for every block pair, the largest attention weight inside it.

    Args:
        q: ``[B, Hq, Tq, D]``, the last ``Tq`` of ``Tk`` tokens.
        k: ``[B, Hk, Tk, D]``, ``Hk`` a divisor of ``Hq``.
        v: ``[B, Hk, Tk, D]``.
        block_size: Tokens per (query block, KV block); query blocks of one token make the target of
            decode gates.
        scale: Softmax scale; default ``D ** -0.5``.
        softcap: Scores become ``softcap * tanh(scores * scale / softcap)`` before the causal mask.
        sinks: Floating point ``[Hq]``, a logit per head that takes part in the softmax's denominator
            only; it has no place in the map.
        per_kv_head: Return one map per KV head: the largest weight over the heads of its group, rows
            divided by their sums after that. The maps of single heads are not written.
        return_lse: Also return the logarithm of the softmax's denominator, sinks included.
        cu_seqlens_q: int32 ``[S + 1]``, the first query of each of ``S`` sequences packed behind one
            another, then ``Tq``. B is 1 then, each sequence's queries are the last of its keys, and the
            map's rows are every sequence's ``ceil(queries / block)`` rows behind one another; its
            columns are blocks counted from each sequence's own first key, as many as the longest
            sequence has, 0 where a sequence has none. The lengths are read back from the device, since
            they make the map's shape.
        cu_seqlens_k: int32 ``[S + 1]``, the same of the keys.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        The exact output ``[B, Hq, Tq, D]``, and the target: fp32 ``[B, Hq, Nq, Nk]`` (``Hk`` maps with
        ``per_kv_head``), the 2-D max-pool of the causal softmax map, each row divided by its sum. With
        ``return_lse`` also fp32 ``[B, Hq, Tq]`` (fp64 for fp64 inputs), a natural logarithm. No gradient
        reaches q, k or v.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If shapes, devices, options or lengths do not fit, or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3.2, equation 2 (arXiv 2410.13276); per KV head, SeerAttention-R, section
    3.2 (arXiv 2506.08889).
    """
    options = {"softcap": softcap, "sinks": sinks, "per_kv_head": per_kv_head, "return_lse": return_lse}
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    out, target, lse = _run(q, k, v, block_size, scale, backend, **options, **packed)
    return (out, target, lse) if return_lse else (out, target)  # type: ignore[return-value]


def pooled_map(
    q: Tensor,
    k: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    per_kv_head: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return only the target of `pooled_attention`, fp32 ``[B, Hq or Hk, Nq, Nk]``."""
    options = {"softcap": softcap, "sinks": sinks, "per_kv_head": per_kv_head}
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return _run(q, k, None, block_size, scale, backend, **options, **packed)[1]


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    block_size: tuple[int, int],
    scale: float | None,
    backend: str,
    **given: Any,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    check_qkv(q, k, v)
    if min(block_size) < 1:
        raise ValueError(f"block sizes must be at least one token, got {block_size}")
    options = PoolOptions(scale=q.shape[-1] ** -0.5 if scale is None else scale, **given)
    options.check(q, k)
    if options.cu_seqlens_q is not None and options.cu_seqlens_k is not None:
        lengths = read_lengths(options.cu_seqlens_q, options.cu_seqlens_k, q, k)
        options = replace(options, lengths=tuple(lengths))
    q, k, v = q.detach(), k.detach(), None if v is None else v.detach()
    module = choose(BACKENDS, ORDER, backend, q=q, k=k, v=v, block_size=block_size, options=options)
    return module.run(q, k, v, block_size, options)
