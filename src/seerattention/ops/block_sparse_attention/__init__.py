"""Causal attention over selected KV blocks: the computation that replaces dense prefill."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import _autograd
from seerattention.ops.dispatch import (
    check_cache,
    check_qkv,
    check_selection,
    choose,
    load_backends,
    outside_autocast,
)
from seerattention.ops.options import Options
from seerattention.rows import Rows, num_blocks
from seerattention.selection import BlockSelection

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order; the first two need a GPU, the third a CPU that it is built for. ``flex``
#: compiles for seconds per kind of call, so it is taken only by name; ``reference`` computes the dense map
#: and is never chosen.
ORDER = ("hopper", "triton", "native", "gather")


class Attended(NamedTuple):
    """What is returned where the softmax's denominators are asked for.

    Attributes:
        out: ``[B, Hq, Tq, D]``, in the dtype of q.
        lse: fp32 ``[B, Hq, Tq]`` (fp64 for fp64 inputs), the denominators' natural logarithms.
    """

    out: Tensor
    lse: Tensor


class _Asked(TypedDict, total=False):
    """What may be given besides tensors, but for what changes the result's type."""

    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    rows: Rows | None
    pages: Tensor | None
    backend: str


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, return_lse: Literal[False] = False,
    **asked: Unpack[_Asked],
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, return_lse: Literal[True],
    **asked: Unpack[_Asked],
) -> Attended: ...  # fmt: skip
@outside_autocast
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
    rows: Rows | None = None,
    pages: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | Attended:
    """Compute causal softmax attention in which each query block reads only its selected KV blocks.

    Differentiable in q, k, v and sinks, through the output and through ``lse``; once, but for the
    reference. On a GPU two runs give the same gradients to the bit. The selection is a choice and has no
    gradient; keys and values that nobody reads get zeros.

    Args:
        q: ``[B, Hq, Tq, D]``, any floating-point dtype.
        k: ``[B, Hk, Tk, D]``, ``Hk`` a divisor of ``Hq``; never expanded to ``Hq`` heads. With ``pages``
            ``[P, Hk, page, D]``, any number of tokens per page, any strides.
        v: Shaped as k.
        selection: The blocks to read. Its batch is B or 1, its heads 1, Hk or Hq. Keys and values of
            unselected blocks do not influence the output, whatever they hold.
        scale: Softmax scale; default ``D ** -0.5``.
        softcap: Scores become ``softcap * tanh(scores * scale / softcap)`` before the causal mask.
        sinks: Floating point ``[Hq]``, a logit per head that takes part in the softmax's denominator
            only.
        return_lse: Also return the logarithm of the softmax's denominator, sinks included.
        rows: Where the queries lie among the keys; default: they are the last of them. Later keys than the
            rows see may follow and are not read. Of packed sequences B is 1, and the selection's rows are
            every sequence's ``ceil(queries / block)`` rows behind one another; its columns are blocks counted
            from each sequence's own first key, as many as the longest sequence has.
        pages: int32 ``[B, N]``, of packed sequences ``[S, N]``, a block table: where in k and v the pages of
            every sequence are, in order. Then ``rows`` must be given, since pages do not say how many keys
            they hold, and there is no gradient. Entries past a sequence's keys are not read, nor is what a
            page holds after the last key. On a GPU nobody checks the numbers of pages.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        ``[B, Hq, Tq, D]`` in the dtype of q; with ``return_lse`` a pair, `Attended`. On a GPU ``hopper`` and
        ``triton`` write it in the order that q has in memory: where q is ``[B, Tq, Hq, D]`` with its
        dimensions transposed, so is the output, and ``out.transpose(1, 2)`` is contiguous.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If shapes, devices, options or the selection do not fit, or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons, or a gradient of keys in pages
            is asked for.

    Source: SeerAttention, section 3.3 (arXiv 2410.13276).
    """
    if pages is None:
        check_qkv(q, k, v)
    else:
        check_cache(q, k, v)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
            raise NotImplementedError(
                "keys and values in pages have no gradient; call under torch.no_grad(), or give k and v "
                "without pages"
            )
    options = Options.of(
        q, k, rows=rows, scale=scale, softcap=softcap, sinks=sinks, return_lse=return_lse, pages=pages
    )
    if rows is not None and pages is None:
        k, v = k[:, :, : rows.num_keys], v[:, :, : rows.num_keys]
    _check_selection(q, k, selection, options)
    args = {"q": q, "k": k, "v": v, "selection": selection, "options": options}
    module = choose(BACKENDS, ORDER, backend, **args)
    out, lse = _autograd.run(module, **args)
    return Attended(out, lse) if return_lse else out


def _check_selection(q: Tensor, k: Tensor, selection: BlockSelection, options: Options) -> None:
    nq, nk = selection.shape[2:]
    rows, (block_q, block_k) = options.rows, selection.block_size
    if rows.is_packed and rows.lengths is None:
        # The lengths are on the device; every sequence ends in at most one short block.
        least, most = num_blocks(rows.num_queries, block_q), num_blocks(rows.num_keys, block_k)
        sequences = options.sequences
        fits = least <= nq < least + sequences
        if not fits or not num_blocks(rows.num_keys, sequences * block_k) <= nk <= most:
            raise ValueError(
                f"the selection has {nq} x {nk} blocks of {selection.block_size} tokens, which {sequences} "
                f"sequences of {rows.num_queries} queries and {rows.num_keys} keys cannot make; select again"
            )
    elif (nq, nk) != (need := rows.num_blocks(selection.block_size)):
        raise ValueError(
            f"the selection has {nq} x {nk} blocks of {selection.block_size} tokens, but {rows.num_queries} "
            f"queries and {rows.num_keys} keys make {need[0]} x {need[1]}; select again for this input"
        )
    check_selection(q, k, selection)
