"""Causal attention over selected KV blocks: the computation that replaces dense prefill."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from seerattention.ops.block_sparse_attention import _gradient
from seerattention.ops.block_sparse_attention._options import Options
from seerattention.ops.dispatch import check_qkv, choose, load_backends
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order; the first two need a GPU. ``flex`` compiles for seconds per kind of call,
#: so it is taken only by name; ``reference`` computes the dense map and is never chosen.
ORDER = ("hopper", "triton", "gather")


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute causal softmax attention in which each query block reads only its selected KV blocks.

    Differentiable in q, k, v and sinks, through the output and through ``lse``; once, but for the
    reference. On a GPU two runs give the same gradients to the bit. The selection is a choice and has no
    gradient; keys and values that nobody reads get zeros.

    Args:
        q: ``[B, Hq, Tq, D]``, the last ``Tq`` of ``Tk`` tokens, any floating-point dtype.
        k: ``[B, Hk, Tk, D]``, ``Hk`` a divisor of ``Hq``; never expanded to ``Hq`` heads.
        v: ``[B, Hk, Tk, D]``.
        selection: The blocks to read. Its batch is B or 1, its heads 1, Hk or Hq. Keys and values of
            unselected blocks do not influence the output, whatever they hold.
        scale: Softmax scale; default ``D ** -0.5``.
        softcap: Scores become ``softcap * tanh(scores * scale / softcap)`` before the causal mask.
        sinks: Floating point ``[Hq]``, a logit per head that takes part in the softmax's denominator
            only.
        return_lse: Also return the logarithm of the softmax's denominator, sinks included.
        cu_seqlens_q: int32 ``[S + 1]``, the first query of each of ``S`` sequences packed behind one
            another, then ``Tq``. B is 1 then, each sequence's queries are the last of its keys, and the
            selection's rows are every sequence's ``ceil(queries / block)`` rows behind one another; its
            columns are blocks counted from each sequence's own first key, as many as the longest
            sequence has. Values are not checked, which would mean to wait for a GPU.
        cu_seqlens_k: int32 ``[S + 1]``, the same of the keys.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        ``[B, Hq, Tq, D]`` in the dtype of q; with ``return_lse`` also fp32 ``[B, Hq, Tq]`` (fp64 for
        fp64 inputs), a natural logarithm.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If shapes, devices, options or the selection do not fit, or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3.3 (arXiv 2410.13276).
    """
    check_qkv(q, k, v)
    options = Options(
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    options.check(q, k)
    _check_selection(q, k, selection, options)
    module = choose(BACKENDS, ORDER, backend, q=q, k=k, v=v, selection=selection, options=options)
    if _gradient.wanted(q, k, v, sinks) and hasattr(module, "backward"):
        return _gradient.run(module.__name__, q, k, v, selection, options)
    return module.run(q, k, v, selection, options)


def _check_selection(q: Tensor, k: Tensor, selection: BlockSelection, options: Options) -> None:
    b, h, nq, nk = selection.shape
    block_q, block_k = selection.block_size
    need = num_blocks(q.shape[2], block_q), num_blocks(k.shape[2], block_k)
    if options.cu_seqlens_q is not None:
        # The lengths are on the device; every sequence ends in at most one short block.
        sequences = len(options.cu_seqlens_q) - 1
        fits = need[0] <= nq < need[0] + sequences and num_blocks(k.shape[2], sequences * block_k) <= nk
        if not fits or nk > need[1]:
            raise ValueError(
                f"the selection has {nq} x {nk} blocks of {selection.block_size} tokens, which {sequences} "
                f"sequences of {q.shape[2]} queries and {k.shape[2]} keys cannot make; select again"
            )
    elif (nq, nk) != need:
        raise ValueError(
            f"the selection has {nq} x {nk} blocks of {selection.block_size} tokens, but {q.shape[2]} "
            f"queries and {k.shape[2]} keys make {need[0]} x {need[1]}; select again for this input"
        )
    if b not in (1, q.shape[0]):
        raise ValueError(f"the selection is for a batch of {b}, q has {q.shape[0]}")
    if h not in (1, k.shape[1], q.shape[1]):
        raise ValueError(
            f"the selection has {h} heads; it must have 1, {k.shape[1]} (KV heads) or "
            f"{q.shape[1]} (query heads)"
        )
    if selection.bits.device != q.device:
        raise ValueError(f"the selection is on {selection.bits.device}, q on {q.device}")
