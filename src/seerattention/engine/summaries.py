"""Block summaries that follow a KV cache, so that a prompt given in pieces is summarised once.

A KV cache holds keys after the rotary embedding; the gate reads them before. What is kept here is the
summary of every finished block and the raw keys of the block still being filled. The cache can be
cropped, copied, reordered or refilled by anyone, so every prefill first compares the cached keys with
those that were summarised. Summaries that no longer belong are dropped, never used; the cached keys are
rotated back by the host's code and summarised again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seerattention.engine.call import AttentionCall, Unrotate
from seerattention.engine.padding import on_device
from seerattention.engine.when import DECODING, decodes
from seerattention.rows import Rows
from seerattention.scorer import Scorer

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Tokens per slice in which cached keys are summarised again.
REBUILD_TOKENS = 2**14

#: How a row's reason begins whose cached keys cannot be summarised.
_MISSING = "dense: cached keys have no summaries, and cannot be rotated back: "

#: Why keys between padding, or some of which were taken out of a cache, cannot be.
POSITIONS = "their positions are not known"


class Growing:
    """Summaries that grow with a KV cache whose tensors grow. See `Summaries`."""

    def __init__(self) -> None:
        self.kept: Kept | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Growing:
        # What is kept is replaced, never written to, so a copy of a KV cache may share it; and the scorer
        # must stay the one that is attached.
        made = Growing()
        made.kept = self.kept
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled KV cache takes no gates along, and what is read back would not be those attached.
        return Growing, ()

    def follow(self, call: AttentionCall, scorer: Scorer, unrotate: Unrotate) -> tuple[str | None, ...]:
        """Summarise a call's keys too, and cached keys that no summary belongs to."""
        new, past = [n for n, _ in call.lengths], [total - n for n, total in call.lengths]
        known = self.kept if any(past) and self.kept and len(self.kept.tokens) == len(past) else None
        kept = known if known and known.fits(call.given.k, scorer) else Kept.nothing(call.given.k, scorer)
        reasons: list[str | None] = [None] * len(new)
        k, cached = call.new_keys()
        if all(decodes(n, total, scorer) for n, total in call.lengths):
            # Decoding reads no summaries, so comparing all keys at every step can wait for the next prefill,
            # which also makes up for the tokens that are left out here.
            if kept.tokens == past:
                self.kept = kept.extended(k, cached, new)
            elif known is not None:
                self.kept = known.shrunk(past)
            return (DECODING,) * len(new)
        if any(past):
            keys = call.all_keys()
            if known is not None and known is not kept:
                # Whether keys were taken out, other gates' summaries tell.
                kept = replace(kept, left=known.compared(keys, past).left)
            kept = kept.compared(keys, past)
            if kept.tokens != past:
                kept, reasons = _caught_up(kept, call, keys, past, unrotate)
                new = [0 if reason else n for n, reason in zip(new, reasons, strict=True)]
        self.kept = kept.extended(k, cached, new)
        return tuple(reasons)

    def read(self) -> Tensor:
        """Return the summaries of all blocks, the last one of the tokens it has so far."""
        assert self.kept is not None
        return self.kept.read()


def _caught_up(
    kept: Kept, call: AttentionCall, keys: Tensor, past: list[int], unrotate: Unrotate
) -> tuple[Kept, list[str | None]]:
    """Summarise the cached keys that have no summaries from what the cache holds of them, or say why not."""
    reasons: list[str | None] = [None] * len(past)
    known = _positions_known(call)
    for row, (have, tokens) in enumerate(zip(kept.tokens, past, strict=True)):
        why = unrotate.why_not if known[row] and not kept.left[row] else POSITIONS
        if have < tokens and why is not None:
            reasons[row] = _MISSING + why
    kept = kept.cut([0 if reason else n for reason, n in zip(reasons, kept.tokens, strict=True)])
    while any(
        missing := [
            0 if reason else min(tokens - have, REBUILD_TOKENS)
            for have, tokens, reason in zip(kept.tokens, past, reasons, strict=True)
        ]
    ):
        assert call.first is not None
        begin = on_device(kept.tokens, keys.device)[:, None]
        part = _from(keys, kept.tokens, max(missing))
        positions = begin + torch.arange(part.shape[2], device=keys.device)
        back = unrotate(call.layer, part, call.first.to(keys.device)[:, None] + positions)
        kept = kept.extended(back, part, missing)
    return kept, reasons


def _positions_known(call: AttentionCall) -> list[bool]:
    """Return whether each row's cached keys come right before its new ones, from the text's beginning on."""
    if call.first is None:
        return [False] * len(call.lengths)
    if call.padding is None:
        return (call.first == 0).tolist()
    # The host may have counted the padding on the left, or not.
    column = call.padding.keys.real.int().argmax(1).to(call.first.device)
    begins = ((call.first == 0) | (call.first == column)).tolist()
    return [begin and not between for begin, between in zip(begins, call.padding.between, strict=True)]


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
        return cls(scorer, zeros, zeros, None, _sums(none), none, _sums(none))

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

    def fits(self, keys: Tensor, scorer: Scorer) -> bool:
        """Whether these are a scorer's summaries of as many rows."""
        return keys.shape[0] == len(self.tokens) and scorer is self.scorer

    def cut(self, tokens: list[int]) -> Kept:
        """Forget all but the first tokens of every row: whole blocks, or a part of the tail."""
        return replace(self, tokens=tokens)

    def shrunk(self, past: list[int]) -> Kept:
        """Remember where a KV cache holds fewer tokens than before."""
        rows = zip(self.tokens, self.left, past, strict=True)
        return replace(self, left=[now if now < (left or have) else left for have, left, now in rows])

    def compared(self, keys: Tensor, past: list[int]) -> Kept:
        """Keep the summaries that are of these keys, per row up to the first key that is not.

        What is kept ends between two blocks, or in the tail: of a finished block the raw keys are gone.

        Args:
            keys: The keys as the KV cache holds them, ``[B, Hk, T, D]``.
            past: How many of them are cached ones, per row.
        """
        block, device = self.block, keys.device
        sums = _behind(self.sums, [n * block for n in self.whole], self.tail_sums)
        held = _sums(keys[:, :, : max(self.tokens)])
        alike = (held == sums[:, :, : held.shape[2]]).all(1)
        most = [min(have, now) for have, now in zip(self.tokens, past, strict=True)]
        alike &= torch.arange(alike.shape[1], device=device) < on_device(most, device)[:, None]
        # One wait for the device.
        found = alike.int().cumprod(1).sum(1).tolist()
        rows = list(zip(found, self.whole, self.shrunk(past).left, strict=True))
        kept = self.cut([n if n >= whole * block else n // block * block for n, whole, _ in rows])
        return replace(kept, left=[left if n < left else 0 for n, _, left in rows])

    def extended(self, k: Tensor, cached: Tensor, new: list[int]) -> Kept:
        """Add keys of new tokens.

        Args:
            k: As the scorer reads them, ``[B, Hk, T, D]``.
            cached: As the KV cache holds them, ``[B, Hk, T, D]``.
            new: How many of them there are, per row.
        """
        block = self.block
        joined = _behind(self.tail, self.rest, k)
        added = _behind(self.tail_sums, self.rest, _sums(cached))
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
        tail, tail_sums = (_from(x, ends, width).clone() for x in (joined, added))
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


def _sums(keys: Tensor) -> Tensor:
    """Sum the bits of every key, ``[B, Hk, T, D]`` -> int64 ``[B, Hk, T]``."""
    return keys.detach().view(_INTEGER[keys.element_size()]).sum(3, dtype=torch.int64)


def _behind(first: Tensor, counts: list[int], second: Tensor) -> Tensor:
    """Put every row of the second tensor behind the first so many columns of the first one's row."""
    if len(set(counts)) == 1:
        return torch.cat((first[:, :, : counts[0]], second), 2) if counts[0] else second
    count = on_device(counts, first.device)[:, None]
    column = torch.arange(max(counts) + second.shape[2], device=first.device)
    column = torch.where(column < count, column, first.shape[2] + column - count)
    return _columns(torch.cat((first, second), 2), column)


def _from(x: Tensor, begins: list[int], width: int) -> Tensor:
    """Return up to so many columns of every row from its beginning on."""
    if len(set(begins)) == 1:
        return x[:, :, begins[0] : begins[0] + width]
    begin = on_device(begins, x.device)[:, None]
    return _columns(x, begin + torch.arange(width, device=x.device))


def _columns(x: Tensor, column: Tensor) -> Tensor:
    """Return of ``[B, H, T, ...]`` the columns ``[B, W]``; past the end, the last one."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[row, column.clamp(max=x.shape[2] - 1)].transpose(1, 2)
