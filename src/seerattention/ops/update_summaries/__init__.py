"""Keep the summaries of a cache's keys while it grows by few tokens at a time: a step of decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.dispatch import choose, load_backends, outside_autocast
from seerattention.scorer import Scorer

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order.
ORDER = tuple(name for name in ("triton", "reference") if name in BACKENDS)


@outside_autocast
@torch.no_grad()
def update_summaries(
    summaries: Tensor,
    tail: Tensor,
    k: Tensor,
    scorer: Scorer,
    *,
    lengths: Tensor,
    backend: str = "auto",
) -> None:
    """Add the keys of new tokens to summaries, in place; nothing waits and nothing is allocated by values.

    Where a block is finished, its summaries are written. Lengths are read on the device, so that a captured
    graph stays right while they change in place.

    Args:
        summaries: ``[B, H, S, E]``, room for those of all blocks that the cache can finish; written from each
            sequence's beginning on.
        tail: ``[B, Hk, b, D]``, keys of the unfinished block, each at its place in the block.
        k: ``[B, Hk, Tq, D]``, new keys as the scorer reads them, fewer than a block.
        scorer: Summarises them.
        lengths: int32 ``[B]``, keys of every sequence, the new ones included, at least ``Tq``. Nobody checks
            them.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Raises:
        TypeError: If the lengths are not int32.
        ValueError: If shapes do not fit or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: the K compression cache of SeerAttention-R, section 3.3 (arXiv 2506.08889).
    """
    block = scorer.block_size[1]
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths must be int32, got {lengths.dtype}")
    if tail.shape != (*k.shape[:2], block, k.shape[3]) or summaries.dim() != 4:
        raise ValueError(
            f"tail must be [B, Hk, {block}, D] and summaries [B, H, S, E] for keys {list(k.shape)}, got "
            f"{list(tail.shape)} and {list(summaries.shape)}"
        )
    if not 1 <= k.shape[2] < block:
        raise ValueError(f"a step adds 1 to {block - 1} tokens, fewer than a block, got {k.shape[2]}")
    if lengths.shape != k.shape[:1] or summaries.shape[0] != k.shape[0]:
        raise ValueError(
            f"k is of {k.shape[0]} sequences, lengths are {list(lengths.shape)}, summaries "
            f"{list(summaries.shape)}"
        )
    args = {"summaries": summaries, "tail": tail, "k": k, "scorer": scorer, "lengths": lengths}
    choose(BACKENDS, ORDER, backend, **args).run(**args)
