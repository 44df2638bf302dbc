"""Summaries of sequences that decode: buffers that every step writes to in place, and nothing waits for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seerattention.engine.call import Step
from seerattention.engine.kept import Kept, from_columns, sums_of
from seerattention.ops.update_summaries import update_summaries
from seerattention.rows import num_blocks
from seerattention.scorer import Scorer


def ample(tokens: int) -> int:
    """Return for how many tokens there should be room where so many will soon be more."""
    return tokens + max(tokens // 4, 1024)


@dataclass(frozen=True, eq=False)
class Steps:
    """The summaries of a batch's rows, in buffers; every row begins at the left.

    Attributes:
        scorer: Makes them; not the one for single tokens.
        summaries: Those of finished blocks, ``[B, H, S, E]``, and room for more.
        tail: Keys of the unfinished blocks as the scorer reads them, each at its place, ``[B, Hk, b, D]``.
        tokens: Tokens summarised, per row; None of a static cache, whose device alone knows.
        begins: The column of every row's first key.
    """

    scorer: Scorer
    summaries: Tensor
    tail: Tensor
    tokens: list[int] | None = None
    begins: list[int] | None = None

    @classmethod
    def empty(cls, kept: Kept, room: int) -> Steps:
        """Return room for the summaries of so many tokens, of rows like those of which something is kept."""
        scorer, like = kept.scorer, kept.tail
        # What is made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            tail = like.new_zeros(*like.shape[:2], kept.block, like.shape[3])
            one = scorer.compress(tail[:1], positions=torch.arange(kept.block, device=tail.device))
            entries = num_blocks(room, kept.block) * one.shape[2]
            return cls(scorer, one.new_zeros(len(tail), one.shape[1], entries, one.shape[3]), tail)

    def serves(self, kept: Kept, room: int) -> bool:
        """Whether there is room for what is kept, and for so many tokens."""
        tail, like = self.tail, kept.tail
        same = self.scorer is kept.scorer and (tail.dtype, tail.device) == (like.dtype, like.device)
        return same and len(tail) == len(like) and room <= self.room

    @property
    def room(self) -> int:
        """Of how many tokens there is room for the summaries."""
        return self.summaries.shape[2] * self.scorer.tokens_per_summary

    def grown(self, tokens: int) -> Steps:
        """Return the same with room for so many tokens, and for some that will come."""
        old, size = self.summaries, self.scorer.tokens_per_summary
        with torch.inference_mode(False), torch.no_grad():
            made = old.new_zeros(*old.shape[:2], num_blocks(ample(tokens), size), old.shape[3])
            made[:, :, : old.shape[2]] = old
        return replace(self, summaries=made)

    def sharing(self, kept: Kept) -> Kept:
        """Return what is kept with its summaries of finished blocks in the buffers, not in memory twice."""
        entries = max(kept.whole) * kept.per_block
        return replace(kept, finished=self.summaries[:, :, :entries]) if entries else kept

    def copied(self) -> Steps:
        """Return a copy, for another cache."""
        return replace(self, summaries=self.summaries.clone(), tail=self.tail.clone())

    @torch.no_grad()
    def filled(self, kept: Kept, tokens: list[int] | None, begins: list[int]) -> Steps:
        """Write what is kept into the buffers, and say so."""
        entries, rest = max(kept.whole) * kept.per_block, max(kept.rest)
        if kept.finished is not None:
            self.summaries[:, :, :entries] = kept.finished[:, :, :entries]
        self.tail[:, :, :rest] = kept.tail[:, :, :rest]
        return replace(self, tokens=tokens, begins=begins)

    def added(self, step: Step) -> Steps:
        """Add a step's keys to the buffers, and say so."""
        scorer, lengths = self.scorer.per_token(), step.lengths
        keys = step.new_keys(scorer.after_rope)
        update_summaries(self.summaries, self.tail, keys, scorer, lengths=lengths.keys)
        return replace(self, tokens=lengths.known)

    def left(self, past: list[int]) -> list[int]:
        """Return of how many tokens the summaries are of use where a cache was cropped to so many.

        Whole blocks, or all where it still ends in the unfinished one.
        """
        block, tokens = self.tail.shape[2], self.tokens or past
        rows = zip(tokens, past, strict=True)
        return [n if n // block == have // block else n // block * block for have, n in rows]

    def kept(self, keys: Tensor, tokens: list[int], left: list[int]) -> Kept:
        """Return what the buffers hold, as it is kept for prefill.

        Args:
            keys: What the cache holds, ``[B, Hk, T, D]``; the summaries are of these keys.
            tokens: How many of them are summarised, per row.
            left: See `Kept`.
        """
        block = self.tail.shape[2]
        whole, rest = [n // block * block for n in tokens], max(n % block for n in tokens)
        sums = sums_of(keys[:, :, : max(tokens)])
        entries = max(whole) // self.scorer.tokens_per_summary
        return Kept(
            self.scorer,
            tokens,
            left,
            self.summaries[:, :, :entries].clone() if entries else None,
            sums[:, :, : max(whole)],
            self.tail[:, :, :rest].clone(),
            from_columns(sums, whole, rest),
        )
