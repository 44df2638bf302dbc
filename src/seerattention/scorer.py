"""What ranks blocks: the protocol of the learned gate and of every baseline."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from seerattention.rows import Rows


class Scorer(Protocol):
    """Anything that ranks blocks: the learned gate and every baseline.

    Attributes:
        block_size: Tokens per (query block, KV block).
        after_rope: Whether it reads q and k after the rotary embedding; the gate reads them before.
        tokens_per_summary: Key tokens per entry of what ``compress`` returns, a divisor of the KV block: the
            block itself, less for sub-blocks, 1 where keys are kept.
    """

    block_size: tuple[int, int]
    after_rope: bool
    tokens_per_summary: int

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Summarise keys once: ``[B, Hk, T, D]`` -> what a cache keeps.

        Along dimension 2 it holds ``ceil(T / tokens_per_summary)`` entries.

        Args:
            k: Keys, the first of them at the start of a block.
            positions: int64 ``[T]`` or ``[B, T]``, each token's position in its sequence.
        """
        ...

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Rank the blocks for every query block: fp32 ``[B, H, Nq, Nk]``, before softmax.

        Args:
            q: ``[B, Hq, Tq, D]``.
            k_blocks: What ``compress`` made of all keys so far.
            positions: int64 ``[Tq]`` or ``[B, Tq]``, the queries' positions.
            valid: bool ``[Nq, Nk]``, the causally valid blocks.
        """
        ...

    def per_token(self) -> Scorer:
        """Return this scorer for single tokens, as in decoding: blocks of ``(1, b)``, the same summaries."""
        ...


class ProductScorer(Scorer, Protocol):
    """A scorer that says how its scores come about, so that a fused kernel can compute them.

    The score of a block pair is the largest ``scale * (query summary . key summary)`` over the pair's
    sub-blocks; of a scorer whose ``shares`` is true it is the largest share, as `score_blocks` says. One with
    a ``score_dtype`` rounds summaries first, see `rounded`. Whoever changes ``score`` to anything else sets
    ``sub_blocks`` to None.

    Attributes:
        sub_blocks: Summaries per (query block, KV block), or None.
        scale: Factor of every inner product, positive.
    """

    sub_blocks: tuple[int, int] | None
    scale: float

    def compress(self, k: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Summarise keys as `Scorer.compress` does; those of packed sequences one behind the other.

        Args:
            k: Keys, of packed sequences ``[1, Hk, T, D]``.
            positions: int64 ``[T]`` or ``[B, T]``, each token's position in its sequence.
            rows: The packed sequences; ``Rows.rectangle`` makes of the result what selecting takes.
        """
        ...

    def summarise_queries(self, q: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Summarise queries: ``[B, Hq, Tq, D]`` -> ``[B, H, ceil(Tq / tokens), E]``; packed as `compress`.

        A scorer with a ``score_dtype`` takes ``rounded_to`` as well, which is that: they are returned so.
        """
        ...


def rounded(summaries: Tensor, scorer: Scorer) -> Tensor:
    """Return summaries as a `ProductScorer` multiplies them for blocks of queries.

    They are rounded to its ``score_dtype``, where it has one, whose largest number stands for all beyond.
    What gradients are asked of is left as it is.
    """
    dtype: torch.dtype | None = getattr(scorer, "score_dtype", None)
    if dtype is None or summaries.requires_grad:
        return summaries
    return narrowed(summaries, dtype).to(summaries.dtype)


def narrowed(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Round numbers to a dtype of few bits, whose largest number stands for all beyond."""
    largest = torch.finfo(dtype).max
    return numbers.clamp(-largest, largest).to(dtype)


def compares_shares(scorer: Scorer) -> bool:
    """Whether a `ProductScorer` compares shares."""
    return bool(getattr(scorer, "shares", False))
