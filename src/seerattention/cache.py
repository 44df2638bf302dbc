"""Block summaries that follow a KV cache, so that a prompt given in pieces is summarised once.

A KV cache holds keys after the rotary embedding; the gate reads them before. What is kept here is the
summary of every finished block and the raw keys of the block still being filled. The cache can be
cropped, copied, reordered or refilled by anyone, so every use first compares the cached keys with
those that were summarised, and summaries that no longer belong are dropped, never used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.gate import Scorer


class KeySummaries:
    """Summaries of the keys of one layer, fed piece by piece.

    Args:
        scorer: Makes the summaries.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.block = scorer.block_size[1]
        self.finished: Tensor | None = None
        self.tail: Tensor | None = None
        # Cached keys at the last token of each finished block, and of every token of the tail: what
        # the KV cache must still hold for the summaries to be of these keys.
        self.block_ends: Tensor | None = None
        self.tail_cached: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens summarised so far."""
        if self.block_ends is None or self.tail is None:
            return 0
        return self.block_ends.shape[2] * self.block + self.tail.shape[2]

    def matches(self, cached: Tensor) -> bool:
        """Whether these are summaries of ``cached``; a cache cropped to fewer tokens matches too.

        Cropped summaries are shortened on the way, where the crop leaves every kept block whole.

        Args:
            cached: The keys of all earlier tokens as the KV cache holds them, ``[B, Hk, T, D]``.
        """
        tokens = cached.shape[2]
        if tokens == 0:
            self.finished = self.tail = self.block_ends = self.tail_cached = None
            return True
        if self.block_ends is None or self.tail is None or self.tail_cached is None:
            return False
        blocks, rest = divmod(tokens, self.block)
        have = self.block_ends.shape[2]
        if blocks > have or rest > (self.tail.shape[2] if blocks == have else 0):
            return False
        ends = cached[:, :, self.block - 1 : blocks * self.block : self.block]
        if not torch.equal(ends, self.block_ends[:, :, :blocks]):
            return False
        if rest and not torch.equal(cached[:, :, blocks * self.block :], self.tail_cached[:, :, :rest]):
            return False
        self.block_ends = self.block_ends[:, :, :blocks]
        self.tail, self.tail_cached = self.tail[:, :, :rest], self.tail_cached[:, :, :rest]
        if self.finished is not None:
            per_block = self.finished.shape[2] // max(have, 1)
            self.finished = self.finished[:, :, : blocks * per_block]
        return True

    def extend(self, k: Tensor, cached: Tensor) -> None:
        """Add the keys of new tokens.

        Args:
            k: New keys as the scorer reads them, ``[B, Hk, T, D]``.
            cached: The same keys as the KV cache holds them, ``[B, Hk, T, D]``.
        """
        start = self.tokens - (0 if self.tail is None else self.tail.shape[2])
        if self.tail is not None and self.tail_cached is not None:
            k, cached = torch.cat([self.tail, k], 2), torch.cat([self.tail_cached, cached], 2)
        whole = k.shape[2] // self.block * self.block
        # Copies, so that neither the ends nor a short tail keep a long prompt's keys alive.
        ends = cached[:, :, self.block - 1 : whole : self.block].clone()
        self.block_ends = ends if self.block_ends is None else torch.cat([self.block_ends, ends], 2)
        if whole:
            positions = torch.arange(start, start + whole, device=k.device)
            new = self.scorer.compress(k[:, :, :whole], positions=positions)
            self.finished = new if self.finished is None else torch.cat([self.finished, new], 2)
        self.tail, self.tail_cached = k[:, :, whole:].clone(), cached[:, :, whole:].clone()

    def all(self) -> Tensor:
        """Return the summaries of every block, the last one of the tokens it has so far."""
        parts = [] if self.finished is None else [self.finished]
        if self.tail is not None and self.tail.shape[2]:
            start = self.tokens - self.tail.shape[2]
            positions = torch.arange(start, self.tokens, device=self.tail.device)
            parts.append(self.scorer.compress(self.tail, positions=positions))
        return torch.cat(parts, 2)
