"""Causal attention over selected KV blocks: the computation that replaces dense prefill."""

from __future__ import annotations

from torch import Tensor

from seerattention.ops._dispatch import check_qkv, choose, load_backends
from seerattention.selection import BlockSelection, num_blocks

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order. ``flex`` wins on long runs of one shape but compiles for seconds, so
#: it is taken only by name; ``reference`` computes the dense map and is never chosen.
ORDER = ("gather",)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute causal softmax attention in which each query block reads only its selected KV blocks.

    Args:
        q: ``[B, Hq, Tq, D]``, the last ``Tq`` of ``Tk`` tokens, any floating-point dtype.
        k: ``[B, Hk, Tk, D]``, ``Hk`` a divisor of ``Hq``; never expanded to ``Hq`` heads.
        v: ``[B, Hk, Tk, D]``.
        selection: The blocks to read. Its batch is B or 1, its heads 1, Hk or Hq. Keys and values of
            unselected blocks do not influence the output, whatever they hold.
        scale: Softmax scale; default ``D ** -0.5``.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        ``[B, Hq, Tq, D]`` in the dtype of q.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If shapes, devices or the selection do not fit, or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3.3 (arXiv 2410.13276).
    """
    check_qkv(q, k, v)
    _check_selection(q, k, selection)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    module = choose(BACKENDS, ORDER, backend, q=q, k=k, v=v, selection=selection)
    return module.run(q, k, v, selection, scale=scale)


def _check_selection(q: Tensor, k: Tensor, selection: BlockSelection) -> None:
    b, h, nq, nk = selection.shape
    block_q, block_k = selection.block_size
    need = num_blocks(q.shape[2], block_q), num_blocks(k.shape[2], block_k)
    if (nq, nk) != need:
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
