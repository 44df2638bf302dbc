"""What is known of the keys of a KV cache's rows: summaries of blocks, and what tells these keys from others.

A KV cache holds keys after the rotary embedding; the gate reads them before. What is kept here is the
summary of every finished block and the raw keys of the block still being filled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seerattention.engine.padding import on_device
from seerattention.rows import Rows
from seerattention.scorer import Scorer

#: Integers by their bytes, the widest first.
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True, eq=False)
class Kept:
    """What is known of the keys of a batch's rows so far; every row begins at the left.

    Attributes:
        scorer: Made the summaries.
        tokens: Tokens summarised, per row.
        left: How many of them the KV cache held when it was shortest, per row, or 0 if it never was shorter:
            with these a cropped cache still begins, and one that keys were taken out of does not.
        finished: Summaries of whole blocks, ``[B, H, N, E]``, or None before there is one.
        sums: int64 ``[B, Hk, T]``, the bits of each cached key, summed, for finished blocks, and
        tail_sums: for the tail: what the KV cache must still hold for the summaries to be of these keys. Not
            just a block's last key: in the first layer it depends on nothing but its own token. Integer sums
            are exact in any order.
        tail: Keys of the last, unfinished block as the scorer reads them, ``[B, Hk, t, D]``.
    """

    scorer: Scorer
    tokens: list[int]
    left: list[int]
    finished: Tensor | None
    sums: Tensor
    tail: Tensor
    tail_sums: Tensor

    @classmethod
    def nothing(cls, keys: Tensor, scorer: Scorer) -> Kept:
        """Return what is known of no token, for keys like ``[B, Hk, T, D]``."""
        zeros, none = [0] * keys.shape[0], keys[:, :, :0]
        return cls(scorer, zeros, zeros, None, sums_of(none), none, sums_of(none))

    @property
    def block(self) -> int:
        """Tokens per block."""
        return self.scorer.block_size[1]

    @property
    def per_block(self) -> int:
        """Summaries per block."""
        return self.block // self.scorer.tokens_per_summary

    @property
    def whole(self) -> list[int]:
        """Finished blocks per row."""
        return [n // self.block for n in self.tokens]

    @property
    def rest(self) -> list[int]:
        """Tokens of the unfinished block, per row."""
        return [n % self.block for n in self.tokens]

    def cut(self, tokens: list[int]) -> Kept:
        """Forget all but the first tokens of every row: whole blocks, or a part of the tail."""
        return replace(self, tokens=tokens)

    def cropped(self, past: list[int]) -> Kept:
        """Forget what a KV cache that was cropped to so many tokens per row does not hold any more.

        What is kept ends between two blocks, or in the tail: of a finished block the raw keys are gone.
        """
        rows = zip(self.tokens, self.whole, past, strict=True)
        block = self.block
        left = [(min(have, now), whole * block) for have, whole, now in rows]
        return self.cut([n if n >= begin else n // block * block for n, begin in left])

    def of_rows(self, rows: list[int]) -> Kept:
        """Return what is known of some rows, in this order; a row may come several times."""
        index = on_device(rows, self.tail.device)
        tokens, left = ([x[row] for row in rows] for x in (self.tokens, self.left))
        finished = None if self.finished is None else self.finished[index]
        sums, tail, tail_sums = (x[index] for x in (self.sums, self.tail, self.tail_sums))
        return Kept(self.scorer, tokens, left, finished, sums, tail, tail_sums)

    def shrunk(self, past: list[int], tokens: list[int] | None = None) -> Kept:
        """Remember where a KV cache holds fewer tokens per row than before.

        Args:
            past: What it holds now; of other rows nothing is remembered.
            tokens: What it held before, if more than what is summarised.
        """
        if len(past) != len(self.tokens):
            return self
        rows = zip(tokens or self.tokens, self.left, past, strict=True)
        return replace(self, left=[now if now < (left or have) else left for have, left, now in rows])

    def compared(self, keys: Tensor, past: list[int]) -> Kept:
        """Keep the summaries that are of these keys, per row up to the first key that is not.

        Rows may have changed places, as those of beams do: each goes on from the one it agrees with most.

        Args:
            keys: The keys as the KV cache holds them, ``[B, Hk, T, D]``; there may be other rows than before.
            past: How many of them are cached ones, per row.
        """
        sums = _behind(self.sums, [n * self.block for n in self.whole], self.tail_sums)
        held = sums_of(keys[:, :, : max(self.tokens)])
        kept, found = self, None
        if len(past) == len(self.tokens):
            (found,) = _alike(held, [(sums, self.tokens)], past)
        if found is None or (len(past) > 1 and found != list(map(min, self.tokens, past))):
            others = [(sums[i : i + 1], [n] * len(past)) for i, n in enumerate(self.tokens)]
            by_row = list(zip(*_alike(held, others, past), strict=True))
            order = [
                max((n, i == row, i) for i, n in enumerate(those))[2] for row, those in enumerate(by_row)
            ]
            kept, found = self.of_rows(order), [those[i] for those, i in zip(by_row, order, strict=True)]
        rows = list(zip(found, kept.shrunk(past).left, strict=True))
        return replace(kept.cropped(found), left=[left if n < left else 0 for n, left in rows])

    def extended(self, k: Tensor, cached: Tensor, new: list[int]) -> Kept:
        """Add keys of new tokens.

        Args:
            k: As the scorer reads them, ``[B, Hk, T, D]``.
            cached: As the KV cache holds them, ``[B, Hk, T, D]``.
            new: How many of them there are, per row.
        """
        block = self.block
        joined = _behind(self.tail, self.rest, k)
        added = _behind(self.tail_sums, self.rest, sums_of(cached))
        totals = [a + b for a, b in zip(self.rest, new, strict=True)]
        most = max(totals) // block
        finished, sums, whole = self.finished, self.sums, self.whole
        if most:
            sums = _behind(sums, [n * block for n in whole], added[:, :, : most * block])
            positions = self._positions([n * block for n in whole], most * block)
            made = self.scorer.compress(joined[:, :, : most * block], positions=positions)
            if finished is not None:
                made = _behind(finished, [n * self.per_block for n in whole], made)
            finished = made
        ends = [n // block * block for n in totals]
        width = max(n % block for n in totals)
        # Copies, so that a short tail does not keep a long prompt's keys alive.
        tail, tail_sums = (from_columns(x, ends, width).clone() for x in (joined, added))
        tokens = [a + b for a, b in zip(self.tokens, new, strict=True)]
        return Kept(self.scorer, tokens, self.left, finished, sums, tail, tail_sums)

    def read(self) -> Tensor:
        """Return the summaries of all blocks, the last one of the tokens it has so far."""
        rest, whole = self.rest, self.whole
        have = [n * self.per_block for n in whole]
        if not any(rest):
            assert self.finished is not None
            return self.finished[:, :, : max(have)]
        if len(set(rest)) == 1:
            positions = self._positions([n * self.block for n in whole], rest[0])
            last = self.scorer.compress(self.tail[:, :, : rest[0]], positions=positions)
        else:
            device = self.tail.device
            row = on_device([i for i, n in enumerate(rest) for _ in range(n)], device)
            column = on_device([j for n in rest for j in range(n)], device)
            positions = on_device([n * self.block for n in whole], device)[row] + column
            tails = self.tail.transpose(0, 1)[:, row, column][None]
            last = summarised(self.scorer, tails, Rows.packed([(n, n) for n in rest], device), positions)
        return last if self.finished is None else _behind(self.finished, have, last)

    def _positions(self, begins: list[int], count: int) -> Tensor:
        """Return ``count`` positions from each row's beginning on, int64 ``[T]``, or ``[B, T]``."""
        numbers = torch.arange(count, device=self.tail.device)
        if len(set(begins)) == 1:
            return numbers + begins[0]
        return on_device(begins, numbers.device)[:, None] + numbers


def summarised(scorer: Any, k: Tensor, rows: Rows, positions: Tensor) -> Tensor:
    """Summarise the keys of packed sequences.

    Args:
        scorer: Summarises them, all at once if it can.
        k: ``[1, Hk, T, D]``.
        rows: The sequences; their queries are their keys.
        positions: int64 ``[T]``, each token's position in its sequence.

    Returns:
        ``[S, H, longest, E]``, finite where a sequence has ended.
    """
    size = scorer.tokens_per_summary
    if getattr(scorer, "sub_blocks", None) is not None:
        made = scorer.compress(k, positions=positions, rows=rows)
    else:
        places = [place for place in rows.places(rows.num_keys) if place.stop > place.start]
        made = torch.cat([scorer.compress(k[:, :, one], positions=positions[one]) for one in places], 2)
    return rows.rectangle(made, rows.num_keys, size)


def sums_of(keys: Tensor) -> Tensor:
    """Sum the bits of every key, ``[B, Hk, T, D]`` -> int64 ``[B, Hk, T]``, in the widest words there are.

    Torch writes narrower ones down as int64 before it adds them up, four times as many bytes as there are.
    """
    width, keys = keys.shape[3] * keys.element_size(), keys.detach()
    size = next(n for n in _INTEGERS if width % n == 0)
    steps = (keys.storage_offset(), *keys.stride()[:3])
    if keys.stride(3) != 1 or any(step * keys.element_size() % size for step in steps):
        keys = keys.clone(memory_format=torch.contiguous_format)
    return keys.view(_INTEGERS[size]).sum(3, dtype=torch.int64)


def _alike(held: Tensor, known: list[tuple[Tensor, list[int]]], past: list[int]) -> list[list[int]]:
    """Return how many of each row's first keys agree with every one of some sums; one wait for the device.

    Args:
        held: The sums of the cached keys, ``[B, Hk, T]``.
        known: Sums of ``[B or 1, Hk, >= T]``, and how many of them there are for each of the rows.
        past: How many keys are cached, per row.
    """
    column, found = torch.arange(held.shape[2], device=held.device), []
    for sums, tokens in known:
        alike = (held == sums[:, :, : held.shape[2]]).all(1)
        alike &= column < on_device(list(map(min, tokens, past)), held.device)[:, None]
        found.append(alike.int().cumprod(1).sum(1))
    return torch.stack(found).tolist()


def _behind(first: Tensor, counts: list[int], second: Tensor) -> Tensor:
    """Put every row of the second tensor behind the first so many columns of the first one's row."""
    if len(set(counts)) == 1:
        return torch.cat((first[:, :, : counts[0]], second), 2) if counts[0] else second
    count = on_device(counts, first.device)[:, None]
    column = torch.arange(max(counts) + second.shape[2], device=first.device)
    column = torch.where(column < count, column, first.shape[2] + column - count)
    return _columns(torch.cat((first, second), 2), column)


def from_columns(x: Tensor, begins: list[int], width: int) -> Tensor:
    """Return up to so many columns of every row from its beginning on."""
    if len(set(begins)) == 1:
        return x[:, :, begins[0] : begins[0] + width]
    begin = on_device(begins, x.device)[:, None]
    return _columns(x, begin + torch.arange(width, device=x.device))


def _columns(x: Tensor, column: Tensor) -> Tensor:
    """Return of ``[B, H, T, ...]`` the columns ``[B, W]``; past the end, the last one."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[row, column.clamp(max=x.shape[2] - 1)].transpose(1, 2)
