"""Context parallelism: which of a prompt's tokens each process has, and how it gets to see the others'.

A prompt is cut into twice as many chunks of whole blocks as there are processes, and each process has an
early chunk and a late one. It summarises its own keys; the summaries, a few numbers per key, are gathered,
so that every process chooses for its own queries among the blocks of all. Keys and values of the layer at
hand are gathered whole, while blocks are being chosen: many thousand queries read nearly every block between
them, so sending only what is read would save nothing (docs/kernels.md). What a process keeps is its
own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from seerattention.rows import num_blocks

T = TypeVar("T")

# Since torch 2.13 under another name.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a tensor of every process of a group, ``[size, ...]``."""
    size = dist.get_world_size(group)
    parts = own.new_empty((size * own.shape[0], *own.shape[1:]))
    _ALL_GATHER(parts, own.contiguous(), group=group)
    return parts.unflatten(0, (size, -1))


class Chunk(NamedTuple):
    """Tokens of one process that follow one another.

    Attributes:
        first: Position of the first of them.
        place: Where that is among all tokens that the process has.
        tokens: How many they are.
    """

    first: int
    place: int
    tokens: int

    @property
    def where(self) -> slice:
        """Their positions."""
        return slice(self.first, self.first + self.tokens)

    @property
    def here(self) -> slice:
        """Their places."""
        return slice(self.place, self.place + self.tokens)


@dataclass(eq=False)
class Context:
    """How the prompts of a batch are spread over the processes of a group.

    Every prompt begins at position 0, and what is left of a shorter one's row is padding. Tokens that follow
    the prompts are on every process.

    Attributes:
        group: The processes.
        block: Tokens that must stay together.
        lengths: Tokens of every prompt.
        pieces: Of every piece given so far, the tokens per chunk.
    """

    group: dist.ProcessGroup
    block: int
    lengths: list[int] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)
    _kept: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def rank(self) -> int:
        """This process."""
        return dist.get_rank(self.group)

    @cached_property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size(self.group)

    @property
    def unit(self) -> int:
        """Tokens of which pieces are made: a block for each chunk."""
        return 2 * self.size * self.block

    @property
    def tokens(self) -> int:
        """Tokens of all processes so far, padding included."""
        return 2 * self.size * sum(self.pieces)

    @property
    def own_tokens(self) -> int:
        """Tokens of this process, as many as of any other."""
        return 2 * sum(self.pieces)

    def add_piece(self, tokens: int) -> None:
        """Spread the next tokens, padded to whole blocks for every chunk."""
        self.pieces.append(num_blocks(tokens, self.unit) * self.block)

    def chunks(self, rank: int) -> list[Chunk]:
        """Return what a process has, in order.

        A query sees what comes before it: chunk ``r`` of the first half and chunk ``r`` from the end cost
        together what those of any other process cost.
        """
        found, first, place = [], 0, 0
        for tokens in self.pieces:
            for number in (rank, 2 * self.size - 1 - rank):
                found.append(Chunk(first + number * tokens, place, tokens))
                place += tokens
            first += 2 * self.size * tokens
        return found

    @property
    def latest(self) -> list[Chunk]:
        """What this process has of the last piece; places count from its first token there."""
        early, late = self.chunks(self.rank)[-2:]
        return [early._replace(place=0), late._replace(place=early.tokens)]

    def alike(self) -> Iterator[tuple[slice, int]]:
        """Iterate over neighbouring rows of the batch whose prompts are equally long, and that length."""
        begin = 0
        for length, rows in groupby(self.lengths):
            end = begin + len(list(rows))
            yield slice(begin, end), length
            begin = end

    def ends(self, chunk: Chunk, block: int) -> Iterator[tuple[int, slice]]:
        """Iterate over rows whose prompt ends inside a block of a chunk, with the places of its tokens."""
        for row, length in enumerate(self.lengths):
            whole = length // block * block
            if whole < length and chunk.first <= whole < chunk.first + chunk.tokens:
                yield row, slice(chunk.place + whole - chunk.first, chunk.place + length - chunk.first)

    def own_lengths(self) -> list[int]:
        """Return how many tokens of every prompt this process has; they come first among its tokens."""
        own = self.chunks(self.rank)
        return [sum(min(max(length - one.first, 0), one.tokens) for one in own) for length in self.lengths]

    def own_blocks(self, block: int) -> list[int]:
        """Return which blocks of so many tokens this process has."""
        return [one.first // block + i for one in self.chunks(self.rank) for i in range(one.tokens // block)]

    def kept(self, name: object, make: Callable[[], T]) -> T:
        """Return what is made once for all layers and steps, until there is another piece."""
        key = name, len(self.pieces)
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def gathered(self, own: Tensor) -> Tensor:
        """Return a tensor of every process, ``[size, ...]``."""
        return gathered(own, self.group)

    def summed(self, own: Tensor) -> Tensor:
        """Return the sum over all processes, in place."""
        dist.all_reduce(own, group=self.group)
        return own

    def in_order(self, own: Tensor, out: Tensor, per: int = 1) -> None:
        """Put what every process has of its tokens where these lie in the prompt.

        Args:
            own: ``[B, H, n, E]``, an entry for every ``per`` tokens of this process, or of its last pieces.
            out: ``[B, H, N, E]``, the same of all processes, to be written.
            per: Tokens per entry.
        """
        begin = self.tokens // per - out.shape[2]
        for rank, part in enumerate(self.gathered(own)):
            place = 0
            for one in self.chunks(rank):
                at, entries = one.first // per - begin, one.tokens // per
                if at >= 0:
                    out[:, :, at : at + entries] = part[:, :, place : place + entries]
                    place += entries


class Exchange:
    """Keys and values of all processes in one layer, on their way to this one.

    Args:
        context: How they are spread.
        k: Those of this process, ``[B, Hk, own tokens, D]``.
        v: Shaped as k.
        stream: Where a GPU does it beside other work.

    Attributes:
        k: Keys of all tokens, ``[B, Hk, tokens, D]``; there after `wait`.
        v: Values.
    """

    def __init__(self, context: Context, k: Tensor, v: Tensor, stream: Any = None) -> None:
        self.k, self.v = (x.new_empty((*x.shape[:2], context.tokens, x.shape[3])) for x in (k, v))
        self._done: Any = None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(k.device))
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            context.in_order(k, self.k)
            context.in_order(v, self.v)
            if stream is not None:
                self._done = stream.record_event()

    def wait(self) -> None:
        """Let what comes wait for them; the host does not."""
        if self._done is not None:
            torch.cuda.current_stream(self.k.device).wait_event(self._done)


def merged(outs: Tensor, lses: Tensor) -> Tensor:
    """Merge attention over parts of the keys.

    Args:
        outs: Over each part, fp32 ``[P, B, Hq, Tq, D]``.
        lses: The logarithms of the softmax's denominators, ``[P, B, Hq, Tq]``; -inf where nothing was read.

    Returns:
        Attention over all of them, ``[B, Hq, Tq, D]``.

    Source: FlashAttention, section 3.1 (arXiv 2205.14135): partial softmaxes add up by their denominators.
    """
    # A row that reads nothing in any part would be NaN.
    total = lses.logsumexp(0).clamp(min=torch.finfo(lses.dtype).min)
    return (outs * (lses - total).exp()[..., None]).sum(0)
