"""Where each sequence's queries lie among its keys: one geometry for prefill, pieces, decoding and packs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def num_blocks(tokens: int, size: int) -> int:
    """Number of blocks of ``size`` tokens that ``tokens`` tokens fill, the last one possibly short."""
    return -(-tokens // size)


@dataclass(frozen=True)
class OneSequence:
    """One sequence of several behind one another.

    Attributes:
        index: Which one of all sequences, those without queries included.
        queries: Its tokens along dimension 2 of the queries.
        keys: Its tokens along dimension 2 of the keys.
        rows: The same sequence alone.
    """

    index: int
    queries: slice
    keys: slice
    rows: Rows


@dataclass(frozen=True, eq=False)
class Rows:
    """Where queries lie among keys, per sequence; causal: a query sees the keys up to its own position.

    Either every batch entry is a sequence of this geometry, or one batch entry holds several sequences
    behind one another (*packed*). Key positions count from the sequence's first key, so a query's position is
    ``first`` plus its number.

    - ``Rows.last(T, T)``: prefill; ``Rows.last(Tq, Tk)``: a later piece; ``Rows.last(1, Tk)``: decoding;
    - ``Rows.at(first, Tq)``: a shard of a long prompt, whose keys may go on after its queries;
    - ``Rows.packed(lengths)``: sequences behind one another, each one's queries the last of its keys.

    Lengths of packed sequences are numbers of the host, or on the device alone (`from_starts`), as in
    a captured graph. Kernels read ``starts_q`` and ``starts_k``; nothing on the hot path reads them back.

    Attributes:
        num_queries: Query tokens, ``Tq``; of all packed sequences together.
        num_keys: Key tokens that a query may see, ``Tk``; of all packed sequences together.
        starts_q: int32 ``[S + 1]``, each packed sequence's first query, then ``Tq``; None if not packed.
        starts_k: int32 ``[S + 1]``, the same of the keys.
        lengths: (queries, keys) of every packed sequence; None where only the device knows them.
    """

    num_queries: int
    num_keys: int
    starts_q: Tensor | None = None
    starts_k: Tensor | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    _kept: dict[object, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def last(cls, num_queries: int, num_keys: int) -> Rows:
        """Queries that are the last of their keys.

        Raises:
            ValueError: If there are no queries, or more queries than keys.
        """
        if not 1 <= num_queries <= num_keys:
            raise ValueError(f"causal attention needs 1 <= Tq <= Tk, got Tq={num_queries} and Tk={num_keys}")
        return cls(num_queries, num_keys)

    @classmethod
    def at(cls, first: int, num_queries: int) -> Rows:
        """Queries from position ``first`` on; keys after the last of them are not seen and need not exist.

        Raises:
            ValueError: If ``first`` is negative or there are no queries.
        """
        if first < 0:
            raise ValueError(f"the first query's position must be at least 0, got {first}")
        return cls.last(num_queries, first + num_queries)

    @classmethod
    def packed(cls, lengths: Sequence[tuple[int, int]], device: torch.device | str | None = None) -> Rows:
        """Sequences behind one another.

        Args:
            lengths: (queries, keys) of every sequence. One may have no queries.
            device: Where kernels read them.

        Raises:
            ValueError: If there is no query, or a sequence has more queries than keys.
        """
        lengths = tuple((int(q), int(k)) for q, k in lengths)
        for i, (queries, keys) in enumerate(lengths):
            if not 0 <= queries <= keys:
                raise ValueError(
                    f"sequence {i} has {queries} queries and {keys} keys; it needs 0 <= queries <= keys"
                )
        starts = torch.tensor([(0, 0), *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        num_queries, num_keys = (int(x) for x in starts[-1])
        if not num_queries:
            raise ValueError(f"{len(lengths)} packed sequences hold no query; give at least one")
        starts_q, starts_k = starts.T.contiguous().to(device or "cpu", non_blocking=True)
        return cls(num_queries, num_keys, starts_q, starts_k, lengths)

    @classmethod
    def from_starts(cls, starts_q: Tensor, starts_k: Tensor, num_queries: int, num_keys: int) -> Rows:
        """Sequences behind one another whose lengths only the device knows; they are not checked.

        Args:
            starts_q: int32 ``[S + 1]``, each sequence's first query, then ``num_queries``.
            starts_k: int32 ``[S + 1]``, the same of the keys.
            num_queries: Query tokens of all sequences.
            num_keys: Key tokens of all sequences.

        Raises:
            TypeError: If the starts are not int32.
            ValueError: If their shapes or devices do not fit.
        """
        for name, x in (("starts_q", starts_q), ("starts_k", starts_k)):
            if x.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {x.dtype}")
        if starts_q.dim() != 1 or len(starts_q) < 2 or starts_q.shape != starts_k.shape:
            raise ValueError(
                "starts_q and starts_k must both be [S + 1] for S >= 1 sequences, got "
                f"{list(starts_q.shape)} and {list(starts_k.shape)}"
            )
        if starts_q.device != starts_k.device:
            raise ValueError(f"starts_q is on {starts_q.device}, starts_k on {starts_k.device}")
        return cls(num_queries, num_keys, starts_q, starts_k)

    @property
    def is_packed(self) -> bool:
        """Whether several sequences lie behind one another in one batch entry."""
        return self.starts_q is not None

    @property
    def first(self) -> int:
        """Position of the first query, which is the number of keys before it; not of packed sequences."""
        assert not self.is_packed, "packed sequences have a first query each"
        return self.num_keys - self.num_queries

    @property
    def known(self) -> tuple[tuple[int, int], ...]:
        """(queries, keys) of every sequence, one if not packed; waits for the device if only it knows them.

        Raises:
            ValueError: If what the device knows does not add up, or a sequence has more queries than keys.
        """
        if self.starts_q is None or self.starts_k is None:
            return ((self.num_queries, self.num_keys),)
        return self._read if self.lengths is None else self.lengths

    # Apart, since compilers of PyTorch cannot enter a cached property.
    @cached_property
    def _read(self) -> tuple[tuple[int, int], ...]:
        assert self.starts_q is not None
        assert self.starts_k is not None
        both = []
        for name, starts, tokens in (
            ("starts_q", self.starts_q, self.num_queries),
            ("starts_k", self.starts_k, self.num_keys),
        ):
            ends = starts.tolist()
            if ends[0] != 0 or ends[-1] != tokens:
                raise ValueError(
                    f"{name} must start with 0 and end with the {tokens} tokens, got {ends[0]} to {ends[-1]}"
                )
            both.append([b - a for a, b in pairwise(ends)])
        return Rows.packed(list(zip(*both, strict=True))).known

    def sequences(self) -> Iterator[OneSequence]:
        """Iterate over the sequences that have queries, each with its place; waits as `known` does."""
        places = zip(self.places(self.num_queries), self.places(self.num_keys), self.known, strict=True)
        for index, (queries, keys, lengths) in enumerate(places):
            if lengths[0]:
                yield OneSequence(index, queries, keys, Rows.last(*lengths))

    def maps(self, block_size: tuple[int, int]) -> Iterator[tuple[OneSequence, tuple[slice, slice]]]:
        """Iterate over the sequences, each with its rows and columns of a map of blocks; waits as `known`."""
        down = self.places(self.num_queries, block_size[0])
        for one in self.sequences():
            yield one, (down[one.index], slice(0, one.rows.num_blocks(block_size)[1]))

    def places(self, tokens: int, size: int = 1) -> list[slice]:
        """Return where each sequence's blocks lie among those of all; waits as `known` does.

        Args:
            tokens: ``num_queries`` or ``num_keys``: whose blocks. Where they are equal, so are the sequences.
            size: Tokens per block; a sequence's last block may be short.

        Raises:
            ValueError: If there are as many neither of queries nor of keys.
        """
        if tokens not in (self.num_queries, self.num_keys):
            raise ValueError(
                f"{tokens} tokens are neither the {self.num_queries} queries nor the {self.num_keys} keys"
            )
        side = 0 if tokens == self.num_queries else 1
        ends = list(accumulate((num_blocks(lengths[side], size) for lengths in self.known), initial=0))
        return [slice(*both) for both in pairwise(ends)]

    def edges(self, tokens: int, size: int, device: torch.device) -> Tensor:
        """Return every packed block's first token and the one after its last, int32 ``[2, N]``, made once.

        Args:
            tokens: As `places` takes it.
            size: As `places` takes it.
            device: Where kernels read them.
        """

        def make() -> Tensor:
            both = []
            for one in self.places(tokens):
                first = torch.arange(one.start, one.stop, size, dtype=torch.int32)
                both.append(torch.stack((first, (first + size).clamp(max=one.stop))))
            return torch.cat(both, 1)

        return self.kept(("edges", tokens, size), device, make)

    def rectangle(self, x: Tensor, tokens: int, size: int) -> Tensor:
        """Lay packed blocks out one sequence below the other.

        Args:
            x: ``[1, H, N, E]``, one entry per block of all sequences.
            tokens: As `places` takes it.
            size: As `places` takes it.

        Returns:
            ``[S, H, longest, E]``; what is left of a shorter sequence's row holds entries of others.
        """

        def make() -> Tensor:
            places = self.places(tokens, size)
            longest = max(one.stop - one.start for one in places)
            first = torch.tensor([one.start for one in places])
            return (first[:, None] + torch.arange(longest)).clamp(max=places[-1].stop - 1)

        return x[0][:, self.kept(("rectangle", tokens, size), x.device, make)].transpose(0, 1)

    def kept(self, name: object, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that is made once, on the host, and kept on a device; nothing waits for it."""
        if (name, device) not in self._kept:
            self._kept[name, device] = make().to(device, non_blocking=True)
        return self._kept[name, device]

    def num_blocks(self, block_size: tuple[int, int]) -> tuple[int, int]:
        """Rows of a map of blocks, and columns of its longest sequence, ``(Nq, Nk)``; waits as `known`."""
        block_q, block_k = block_size
        return (
            self.places(self.num_queries, block_q)[-1].stop,
            num_blocks(max(keys for _, keys in self.known), block_k),
        )

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Position of every query in its sequence, int64 ``[Tq]``."""
        if self.starts_q is None or self.starts_k is None:
            return torch.arange(self.first, self.num_keys, device=device)
        token = torch.arange(self.num_queries, device=self.starts_q.device)
        sequence = torch.searchsorted(self.starts_q, token, right=True, out_int32=True) - 1
        # Keys end where queries do.
        past = (self.starts_k - self.starts_q).diff()
        return (token - self.starts_q[sequence] + past[sequence]).to(device)

    def causal(self, block_size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        """Mark the block pairs in which at least one query may see at least one key.

        Query blocks are counted from a sequence's first query given, KV blocks from its first key.

        Args:
            block_size: Tokens per (query block, KV block).
            device: Where to build the result.

        Returns:
            bool ``[Nq, Nk]``.
        """
        first_key, _, last_query = self.corners(block_size, device)
        return first_key <= last_query

    def own(self, block_size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        """Mark the KV blocks that hold a query block's own tokens: those that are always read.

        One block per row where query and KV blocks are aligned; more where a query block spans several.

        Args:
            block_size: Tokens per (query block, KV block).
            device: Where to build the result.

        Returns:
            bool ``[Nq, Nk]``.
        """
        first_key, first_query, last_query = self.corners(block_size, device)
        return (first_key <= last_query) & (first_key + block_size[1] > first_query)

    def corners(
        self, block_size: tuple[int, int], device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return where KV blocks begin, ``[1, Nk]``, and where query blocks begin and end, ``[Nq, 1]`` each.

        Args:
            block_size: Tokens per (query block, KV block).
            device: Where to build the results.
        """
        block_q, block_k = block_size
        first, last = [], []
        for queries, keys in self.known:
            blocks = torch.arange(0, queries, block_q, device=device) + keys - queries
            first.append(blocks)
            last.append((blocks + block_q - 1).clamp(max=keys - 1))
        longest = max(keys for _, keys in self.known)
        columns = torch.arange(0, longest, block_k, device=device)
        return columns[None], torch.cat(first)[:, None], torch.cat(last)[:, None]
