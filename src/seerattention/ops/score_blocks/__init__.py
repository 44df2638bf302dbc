"""Scores of block pairs: the largest product, or share, over their pairs of sub-blocks, with a gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.dispatch import choose, load_backends, outside_autocast
from seerattention.ops.options import ScoreOptions
from seerattention.ops.score_blocks.chunked import SLICE_BYTES as SLICE_BYTES
from seerattention.rows import Rows, num_blocks

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order.
ORDER = ("triton", "native", "chunked")


@outside_autocast
def score_blocks(
    queries: Tensor,
    keys: Tensor,
    sub_blocks: tuple[int, int],
    *,
    scale: float | None = None,
    rows: Rows | None = None,
    block_size: tuple[int, int] = (64, 64),
    shares: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Score block pairs: ``scale`` times the largest product over their pairs of summaries, or its share.

    The gradient of a product goes to the one pair that made it; among equals to the lowest sub-block of
    queries, then of keys. Nothing of the size of sub-block pairs is kept for the backward pass.

    Args:
        queries: Summaries of the query blocks, ``[B, H, Sq, E]``, in order;
            ``Nq = ceil(Sq / sub_blocks[0])``, a short last block has the summaries it has. Of packed
            sequences ``[1, H, Sq, E]``, behind one another.
        keys: Summaries of the KV blocks, ``[B, Hk, Sk, E]``, ``Hk`` a divisor of ``H``: neighbouring heads
            of queries share a head of keys. Of the dtype of ``queries``. Of packed sequences
            ``[S, Hk, longest Sk, E]``, what a shorter one leaves is not read.
        sub_blocks: Summaries per (query block, KV block).
        scale: Factor of the scores; default ``E ** -0.5``.
        rows: Where the queries lie among the keys: what comes after a block's last query is 0 and passes no
            gradient. Default every pair is scored.
        block_size: Tokens per (query block, KV block), which ``rows`` is divided into.
        shares: Compare what query summaries give blocks instead of their products: of every query summary,
            the softmax over blocks of its largest product in each, among the summaries of keys of which it
            sees a token; a pair's score is the logarithm of the largest share of a summary of its queries.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        fp32 ``[B, H, Nq, Nk]`` (fp64 for fp64 summaries), differentiable once; of packed sequences
        ``[1, H, Nq, longest Nk]``.

    Raises:
        TypeError: If the dtypes differ or are not floating point.
        ValueError: If shapes do not fit, a number is out of range or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3.1 (arXiv 2410.13276); sub-blocks and shares are this project's
    (docs/method.md).
    """
    factor = queries.shape[-1] ** -0.5 if scale is None else scale
    options = ScoreOptions(
        sub_blocks=sub_blocks, scale=factor, rows=rows, block_size=block_size, shares=shares
    )
    _check(queries, keys, options)
    run = choose(BACKENDS, ORDER, backend, queries=queries, keys=keys, options=options).run
    if rows is None or not rows.is_packed:
        return run(queries, keys, options)
    size_q, size_k = options.size
    places, longest = rows.places(rows.num_queries, size_q), rows.num_blocks(block_size)[1]
    parts = []
    for one in rows.sequences():
        own = keys[one.index, None, :, : num_blocks(one.rows.num_keys, size_k)]
        part = run(queries[:, :, places[one.index]], own, replace(options, rows=one.rows))
        parts.append(F.pad(part, (0, longest - part.shape[3])))
    return torch.cat(parts, 2)


def check_pair(queries: Tensor, keys: Tensor) -> None:
    """Check that there are summaries of queries and of keys, which products can be made of.

    Raises:
        ValueError: If there are none, or heads or dimensions do not fit.
    """
    for name, x in (("queries", queries), ("keys", keys)):
        if x.dim() != 4 or not x.numel():
            raise ValueError(f"{name} must be [B, H, S >= 1, E], got {list(x.shape)}")
    if queries.shape[3] != keys.shape[3]:
        raise ValueError(
            f"queries {list(queries.shape)} and keys {list(keys.shape)} must agree in batch and dimension"
        )
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(
            f"heads of queries must be a multiple of those of keys, got {queries.shape[1]} and "
            f"{keys.shape[1]}"
        )


def _check(queries: Tensor, keys: Tensor, options: ScoreOptions) -> None:
    sub_blocks, rows, block_size = options.sub_blocks, options.rows, options.block_size
    check_pair(queries, keys)
    if queries.dtype != keys.dtype or not queries.dtype.is_floating_point:
        raise TypeError(
            f"queries and keys must share one floating-point dtype, got {queries.dtype} and {keys.dtype}"
        )
    batch = (queries.shape[0],) * 2 if rows is None or not rows.is_packed else (1, len(rows.known))
    if (queries.shape[0], keys.shape[0]) != batch:
        raise ValueError(
            f"queries {list(queries.shape)} and keys {list(keys.shape)} must agree in batch and dimension"
        )
    if min(sub_blocks) < 1:
        raise ValueError(f"sub_blocks must be at least one summary per block, got {sub_blocks}")
    if rows is None:
        return
    if any(b % s for b, s in zip(block_size, sub_blocks, strict=True)):
        raise ValueError(f"sub_blocks={sub_blocks} must divide the blocks of {block_size} tokens")
    size_q, size_k = options.size
    down = rows.places(rows.num_queries, size_q)[-1].stop
    across = num_blocks(max(k for _, k in rows.known), size_k)
    if queries.shape[2] != down or (keys.shape[2] < across if rows.is_packed else keys.shape[2] != across):
        raise ValueError(
            f"{rows.num_queries} queries and {rows.num_keys} keys have {down} and {across} summaries, got "
            f"{queries.shape[2]} and {keys.shape[2]}"
        )
