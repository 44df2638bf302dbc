"""Where each sequence's queries lie among its keys: one geometry for prefill, pieces, decoding and packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


def num_blocks(tokens: int, size: int) -> int:
    """Number of blocks of ``size`` tokens that ``tokens`` tokens fill, the last one possibly short."""
    return -(-tokens // size)


@dataclass(frozen=True)
class OneSequence:
    """One sequence of several behind one another.

    Attributes:
        queries: Its tokens along dimension 2 of the queries.
        keys: Its tokens along dimension 2 of the keys.
        rows: The same sequence alone.
    """

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

    @cached_property
    def known(self) -> tuple[tuple[int, int], ...]:
        """(queries, keys) of every sequence, one if not packed; waits for the device if only it knows them.

        Raises:
            ValueError: If what the device knows does not add up, or a sequence has more queries than keys.
        """
        if self.starts_q is None or self.starts_k is None:
            return ((self.num_queries, self.num_keys),)
        if self.lengths is not None:
            return self.lengths
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
        query = key = 0
        for queries, keys in self.known:
            if queries:
                yield OneSequence(
                    slice(query, query + queries), slice(key, key + keys), Rows.last(queries, keys)
                )
            query, key = query + queries, key + keys

    def num_blocks(self, block_size: tuple[int, int]) -> tuple[int, int]:
        """Rows of a map of blocks, and columns of its longest sequence, ``(Nq, Nk)``; waits as `known`."""
        block_q, block_k = block_size
        return (
            sum(num_blocks(queries, block_q) for queries, _ in self.known),
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
        first_key, _, last_query = self._edges(block_size, device)
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
        first_key, first_query, last_query = self._edges(block_size, device)
        return (first_key <= last_query) & (first_key + block_size[1] > first_query)

    def _edges(
        self, block_size: tuple[int, int], device: torch.device | str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """First position of every KV block ``[1, Nk]``, first and last of every query block ``[Nq, 1]``."""
        block_q, block_k = block_size
        first, last = [], []
        for queries, keys in self.known:
            blocks = torch.arange(0, queries, block_q, device=device) + keys - queries
            first.append(blocks)
            last.append((blocks + block_q - 1).clamp(max=keys - 1))
        longest = max(keys for _, keys in self.known)
        columns = torch.arange(0, longest, block_k, device=device)
        return columns[None], torch.cat(first)[:, None], torch.cat(last)[:, None]
