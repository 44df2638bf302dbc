"""Block summaries that follow a KV cache, so that a prompt given in pieces is summarised once.

A KV cache holds keys after the rotary embedding; the gate reads them before. What is kept here is the
summary of every finished block and the raw keys of the block still being filled. The cache can be
cropped, copied, reordered or refilled by anyone, so every prefill first compares the cached keys with
those that were summarised. Summaries that no longer belong are dropped, never used; whoever holds the
model's rotary code can rotate the cached keys back and summarise them again.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from seerattention.gate import Scorer

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    return x.detach().view(_INTEGER[x.element_size()])


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
        # The cached keys' bits, summed over each finished block, and as they are for the tail: what the
        # KV cache must still hold for the summaries to be of these keys. Not just a block's last key: in
        # the first layer it depends on nothing but its own token. Integer sums are exact in any order.
        self.block_bits: Tensor | None = None
        self.tail_bits: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> KeySummaries:
        # Tensors here are replaced, never written to, so a copy of a KV cache may share them; and the
        # scorer must stay the one that is attached.
        return copy.copy(self)

    @property
    def tokens(self) -> int:
        """Tokens summarised so far."""
        if self.block_bits is None or self.tail is None:
            return 0
        return self.block_bits.shape[2] * self.block + self.tail.shape[2]

    def row(self, index: int) -> KeySummaries:
        """Return the summaries of one sequence of the batch."""
        one = copy.copy(self)
        for name in ("finished", "tail", "block_bits", "tail_bits"):
            value = getattr(self, name)
            setattr(one, name, None if value is None else value[index : index + 1])
        return one

    def as_long_as(self, cached: Tensor) -> bool:
        """Whether as many keys were summarised as are cached: cheap, and no proof that they are these.

        Args:
            cached: The keys of all earlier tokens as the KV cache holds them, ``[B, Hk, T, D]``.
        """
        return self.tokens == cached.shape[2] and (self.tail is None or self.tail.shape[0] == cached.shape[0])

    def keep(self, cached: Tensor) -> int:
        """Keep the summaries that are of ``cached``, up to the first block that is not, and drop the rest.

        Args:
            cached: The keys of all earlier tokens as the KV cache holds them, ``[B, Hk, T, D]``.

        Returns:
            How many of these tokens are summarised; the keys of the others must be given to `extend`.
        """
        if self.block_bits is None or self.tail is None or self.tail_bits is None:
            return 0
        bits = _bits(cached)
        if self.tail_bits.shape[0] != bits.shape[0] or self.tail_bits.dtype != bits.dtype:
            self._cut(0, 0)
            return 0
        have = self.block_bits.shape[2]
        blocks = min(have, cached.shape[2] // self.block)
        whole = blocks * self.block
        alike = self._sums(bits[:, :, :whole]) == self.block_bits[:, :, :blocks]
        kept = int(alike.all(3).all(1).all(0).int().cumprod(0).sum())
        rest = min(self.tail.shape[2], cached.shape[2] - whole) if kept == have else 0
        if not torch.equal(bits[:, :, whole : whole + rest], self.tail_bits[:, :, :rest]):
            rest = 0
        self._cut(kept, rest)
        return kept * self.block + rest

    def _cut(self, blocks: int, rest: int) -> None:
        """Forget all but the first finished blocks and the first tokens of the tail."""
        assert self.block_bits is not None
        assert self.tail is not None
        assert self.tail_bits is not None
        if not blocks and not rest:
            self.finished = self.tail = self.block_bits = self.tail_bits = None
            return
        if self.finished is not None:
            per_block = self.finished.shape[2] // max(self.block_bits.shape[2], 1)
            self.finished = self.finished[:, :, : blocks * per_block]
        self.block_bits = self.block_bits[:, :, :blocks]
        self.tail, self.tail_bits = self.tail[:, :, :rest], self.tail_bits[:, :, :rest]

    def _sums(self, bits: Tensor) -> Tensor:
        return bits.unflatten(2, (bits.shape[2] // self.block, self.block)).sum(3, dtype=torch.int64)

    def extend(self, k: Tensor, cached: Tensor) -> None:
        """Add the keys of new tokens.

        Args:
            k: New keys as the scorer reads them, ``[B, Hk, T, D]``.
            cached: The same keys as the KV cache holds them, ``[B, Hk, T, D]``.
        """
        bits = _bits(cached)
        start = self.tokens - (0 if self.tail is None else self.tail.shape[2])
        if self.tail is not None and self.tail_bits is not None:
            k, bits = torch.cat([self.tail, k], 2), torch.cat([self.tail_bits, bits], 2)
        whole = k.shape[2] // self.block * self.block
        sums = self._sums(bits[:, :, :whole])
        self.block_bits = sums if self.block_bits is None else torch.cat([self.block_bits, sums], 2)
        if whole:
            positions = torch.arange(start, start + whole, device=k.device)
            new = self.scorer.compress(k[:, :, :whole], positions=positions)
            self.finished = new if self.finished is None else torch.cat([self.finished, new], 2)
        # Copies, so that a short tail does not keep a long prompt's keys alive.
        self.tail, self.tail_bits = k[:, :, whole:].clone(), bits[:, :, whole:].clone()

    def all(self) -> Tensor:
        """Return the summaries of every block, the last one of the tokens it has so far."""
        parts = [] if self.finished is None else [self.finished]
        if self.tail is not None and self.tail.shape[2]:
            start = self.tokens - self.tail.shape[2]
            positions = torch.arange(start, self.tokens, device=self.tail.device)
            parts.append(self.scorer.compress(self.tail, positions=positions))
        return torch.cat(parts, 2)
