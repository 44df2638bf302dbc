"""Positions with gaps: sequences shorter than a model reads teach gates for all that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from seerattention.hosts.transformers.rotary import position_limit, why_no_gaps
from seerattention.rows import num_blocks

#: Share of the steps whose positions have gaps, and the most gaps of a sequence. Source: measured,
#: docs/method.md.
SHARE, MOST_GAPS = 0.7, 16


def gapped_positions(seed: int, step: int, length: int, limit: int, block_size: int) -> Tensor:
    """Return the positions of a sequence's tokens in a step, a pure function of the arguments.

    They ascend from 0. In `SHARE` of the steps 1 to `MOST_GAPS` gaps are among them, behind whole blocks
    and as long as some, so that a block's tokens stay neighbours. What is left out before a token is drawn
    evenly from all that the limit has room for. Of a single block, or without room for a gap, they are
    0, 1, 2, ...

    Args:
        seed: Of the gaps.
        step: Number of the step.
        length: Tokens of the sequence.
        limit: Positions are below it.
        block_size: Tokens per block.

    Returns:
        int64 ``[length]``.

    Source: PoSE (arXiv 2309.10400), which lets a model learn so to read further; here its gates do.
    """
    positions, bounds = torch.arange(length), num_blocks(length, block_size) - 1
    room = (limit - length) // block_size
    # A stream of its own: windows of text are drawn by the seed and the step too.
    rng = np.random.default_rng((seed, step, 1))
    if min(bounds, room) < 1 or rng.random() >= SHARE:
        return positions
    count = int(rng.integers(1, min(MOST_GAPS, bounds, room), endpoint=True))
    at = np.sort(1 + rng.choice(bounds, count, replace=False))
    left_out = np.sort(1 + rng.choice(room, count, replace=False))
    gaps = np.zeros(bounds + 1, np.int64)
    gaps[at] = np.diff(left_out, prepend=0)
    before = torch.from_numpy(gaps.cumsum()).repeat_interleave(block_size)[:length]
    return positions + block_size * before


@dataclass(frozen=True)
class Reach:
    """Up to which position gates are taught.

    Attributes:
        tokens: All positions are below it.
        length: Tokens of the longest sequences; where that is the reach, positions have no gaps.
        limit: Positions that the model has, None where its configuration names none.
        why: Why positions cannot have gaps, None where they can.
    """

    tokens: int
    length: int
    limit: int | None
    why: str | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, length: int, asked: int | None = None) -> Self:
        """Return how far sequences of a length teach the gates of a model.

        Args:
            config: The model's.
            length: Tokens of the longest sequences.
            asked: The reach, ``length`` for no gaps; default the model's own limit where positions can have
                gaps.

        Raises:
            ValueError: If the reach is below the length, past the model's limit, or cannot be had.
        """
        limit, why = position_limit(config), why_no_gaps(config)
        if asked is None:
            return cls(length if why else max(length, limit or 0), length, limit, why)
        if asked < length:
            raise ValueError(
                f"a reach of {asked:,} is below the length of the sequences, {length:,} tokens; give that or "
                "more, or shorter sequences"
            )
        if asked > length and limit is not None and asked > limit:
            raise ValueError(
                f"a reach of {asked:,} is past the model's limit of {limit:,} positions; give that or less, "
                "or extend the model first"
            )
        if asked > length and why:
            raise ValueError(
                f"a reach of {asked:,} needs sequences of as many tokens, since {why}; give that length, or "
                "leave reach out"
            )
        return cls(asked, length, limit, why)

    @property
    def has_gaps(self) -> bool:
        """Whether positions have gaps in some steps."""
        return self.tokens > self.length

    def positions(self, seed: int, step: int, length: int, block_size: int) -> Tensor:
        """Return the positions of a document of a step, int64 ``[length]``; see `gapped_positions`."""
        limit = self.tokens if self.has_gaps else length
        return gapped_positions(seed, step, length, limit, block_size)

    def __str__(self) -> str:
        if self.limit is None:
            taught = f"taught up to {self.tokens:,}; the model's configuration names no limit"
        else:
            of = "of" if self.tokens <= self.limit else "past"
            taught = f"taught up to {self.tokens:,} {of} the model's {self.limit:,}"
        if self.has_gaps:
            return f"{taught}: in {SHARE:.0%} of the steps there are gaps between blocks"
        if self.why and self.length < (self.limit or self.length + 1):
            return f"{taught}: {self.why}; longer sequences teach further"
        return taught
