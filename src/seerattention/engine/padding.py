"""Which tokens of a padded batch are real: worked out once per forward pass, for every layer."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.dense_attention import dense_attention
from seerattention.rows import Rows


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Return numbers of the host as int64 on a device, without waiting for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


class Lengths(NamedTuple):
    """How long the sequences of a batch are in a step of decoding, whose padding is on the left.

    Attributes:
        keys: Of every sequence its keys, the new tokens' included, int32 ``[B]`` on the device.
        starts: The column of its first key, int32 ``[B]``; None where all begin in the first one.
        begins: The same on the host; None where nobody looked.
        known: ``keys`` on the host; None where only the device knows.
        held: Columns in use of a cache with room for more, an integer on the device; None where all are.
    """

    keys: Tensor
    starts: Tensor | None
    begins: list[int] | None
    known: list[int] | None
    held: Tensor | None

    @classmethod
    def of(
        cls,
        real: Tensor | None,
        held: int | Tensor,
        new: int,
        *,
        batch: int,
        device: torch.device,
        trust: bool = False,
    ) -> Lengths | None:
        """Return the lengths of a batch, or None if there is padding anywhere but before its old tokens.

        Args:
            real: bool ``[B, T]``, which keys are real, or None if all are. Where only the device knows how
                many are in use, there may be more columns. The host waits to see that they are as they should
                be.
            held: Columns in use, a tensor where only the device knows.
            new: New tokens, in the last of these columns.
            batch: Sequences.
            device: Where they are.
            trust: Look for nothing but where sequences begin, without waiting.
        """
        counted = None
        if isinstance(held, Tensor):
            held = counted = held.to(device)
        if real is None:
            begins = [0] * batch
            if isinstance(held, Tensor):
                return cls(held.int().expand(batch).contiguous(), None, begins, None, counted)
            keys = torch.full((batch,), held, dtype=torch.int32, device=device)
            return cls(keys, None, begins, [held] * batch, None)
        if counted is None and real.shape[1] != held:
            return None
        real = real.to(device)
        starts = real.int().argmax(1).int()
        begins = known = None
        if not trust:
            column = torch.arange(real.shape[1], device=device)
            fine = (real | (column < starts[:, None]) | (column >= held)).all()
            fine = fine & (starts <= held - new).all() & (len(column) >= held)
            # One wait for the device.
            *begins, fits = torch.cat((starts, fine[None].int())).tolist()
            if not fits:
                return None
            if not any(begins):
                return cls.of(None, held, new, batch=batch, device=device)
            known = None if isinstance(held, Tensor) else [held - begin for begin in begins]
        return cls((held - starts).int(), starts, begins, known, counted)


class Side:
    """The queries of a padded batch, or its keys.

    Args:
        real: bool ``[B, T]``.

    Attributes:
        row: Of every real token its row, int64 ``[sum T]``, and
        token: its column; row by row.
        rank: Its number among the row's real tokens.
    """

    def __init__(self, real: Tensor) -> None:
        self.real = real
        self.row, self.token = real.nonzero(as_tuple=True)
        self.rank = (real.cumsum(1) - 1)[self.row, self.token]

    def pack(self, x: Tensor) -> Tensor:
        """Put the real tokens behind one another, ``[B, H, T, D]`` -> ``[1, H, sum T, D]``."""
        return x.transpose(0, 1)[:, self.row, self.token][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Undo `pack`, with zeros where nothing is real; in memory tokens come before heads."""
        _, heads, _, dim = x.shape
        out = x.new_zeros(*self.real.shape, heads, dim)
        # In the order in which models join the heads of a token, which then takes no copy.
        out[self.row, self.token] = x[0].transpose(0, 1)
        return out.transpose(1, 2)

    def align(self, x: Tensor) -> Tensor:
        """Move every row's real tokens to its beginning, ``[B, H, T, D]``, zeros behind them."""
        return self._spread(self.pack(x)[0], self.rank)

    def unalign(self, x: Tensor) -> Tensor:
        """Undo `align`."""
        return self._spread(x.transpose(0, 1)[:, self.row, self.rank], self.token)

    def _spread(self, packed: Tensor, columns: Tensor) -> Tensor:
        heads, _, dim = packed.shape
        out = packed.new_zeros(heads, *self.real.shape, dim)
        out[:, self.row, columns] = packed
        return out.transpose(0, 1)


class Padding:
    """The real tokens of a padded batch.

    Args:
        real: bool ``[B, Tk]``, which keys are real.
        num_queries: Query tokens, the last columns of ``real``.
        lengths: (real queries, real keys) of every row, kept as an attribute.

    Attributes:
        queries: Where the real queries are.
        keys: Where the real keys are.
    """

    def __init__(self, real: Tensor, num_queries: int, lengths: list[tuple[int, int]]) -> None:
        self.lengths = lengths
        self.keys = Side(real)
        self.queries = Side(real[:, -num_queries:])

    @cached_property
    def rows(self) -> Rows:
        """The rows behind one another."""
        return Rows.packed(self.lengths, self.keys.real.device)

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Position in its row of every query, int64 ``[B, Tq]``, and of every key, -1 for padding."""
        keys = (self.keys.real.cumsum(1) - 1).masked_fill(~self.keys.real, -1)
        return keys[:, -self.queries.real.shape[1] :], keys

    @cached_property
    def between(self) -> list[bool]:
        """Whether a row has padding between its tokens; waits for the device."""
        real = F.pad(self.keys.real.int(), (1, 0))
        return ((real.diff(dim=1) > 0).sum(1) > 1).tolist()

    @classmethod
    def of(cls, real: Tensor, num_queries: int) -> Padding | None:
        """Return the padding of a batch, or None if all tokens are real; waits for the device."""
        lengths = torch.stack((real[:, -num_queries:].sum(1), real.sum(1)), 1).tolist()
        if all(k == real.shape[1] for _, k in lengths):
            return None
        return cls(real, num_queries, [(q, k) for q, k in lengths])

    def first(self, position_ids: Tensor) -> Tensor:
        """Return the position of every row's first key, int64 ``[B]``, from those of all query tokens.

        They are the columns' of `real`, int64 ``[B or 1, Tq]``; a row with padding between its tokens, or
        without queries, gives a number without meaning.
        """
        real = self.queries.real
        of_first = position_ids.expand(real.shape[0], -1).gather(1, real.int().argmax(1, keepdim=True))[:, 0]
        return of_first - on_device([k - q for q, k in self.lengths], of_first.device)

    def part(self, rows: list[int]) -> Padding:
        """Return the padding of some rows."""
        num_queries = self.queries.real.shape[1]
        return Padding(self.keys.real[rows], num_queries, [self.lengths[i] for i in rows])

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Dense attention of the batch as it is, zeros where there is no query; see `dense_attention`."""
        if q.shape[2] == k.shape[2]:
            # From their beginnings on, all rows have the same causal mask.
            out = dense_attention(*(self.keys.align(x) for x in (q, k, v)), **options)
            return self.queries.unalign(out)
        return dense_attention(q, k, v, positions=self.positions, **options)
