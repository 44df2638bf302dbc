"""What a call of an op may ask for besides its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from seerattention.rows import Rows

#: What a query has of a KV block: its largest attention weight, or the sum of its weights.
Pool = Literal["max", "mass"]
POOLS: tuple[Pool, ...] = get_args(Pool)


class Asked:
    """What a call asks for, as an error names it."""

    def __repr__(self) -> str:
        """Name what differs from the defaults, tensors by their shape: values may be on a device."""
        shown = []
        for field in fields(self):  # type: ignore[arg-type]  # a dataclass
            value = getattr(self, field.name)
            if value is not field.default:
                shown.append(f"{field.name}={_short(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> Any:
    if isinstance(value, Rows):
        packed = "" if value.starts_q is None else f" of {len(value.starts_q) - 1} packed sequences"
        return f"{value.num_queries} of {value.num_keys} tokens{packed}"
    if isinstance(value, tuple):
        return tuple(_short(x) for x in value)
    return list(value.shape) if isinstance(value, Tensor) else value


def _check_whole(x: Any, name: str, shape: str, q: Tensor, sequences: int = 0) -> None:
    """Check that ``x`` is int32 of a shape that begins with the sequences, those of q if none are packed."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of int32, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}")
    if x.dim() != shape.count(",") + 1 or x.shape[0] != (sequences or q.shape[0]):
        many = f"{sequences} packed sequences" if sequences else f"a batch of {q.shape[0]}"
        raise ValueError(f"{name} must be {shape} for {many}, got {list(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} are on {x.device}, q on {q.device}")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Options(Asked):
    """The optional parts of one call, as every backend gets them: arguments of `block_sparse_attention`.

    Attributes:
        pages: int32 ``[B, N]``, of packed sequences ``[S, N]``: the pages of every sequence in order; None
            where a sequence's keys lie behind one another.
    """

    rows: Rows
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    return_lse: bool = False
    pages: Tensor | None = None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, *, rows: Rows | None = None, scale: float | None = None, **more: Any
    ) -> Self:
        """Check what a caller gave and fill in the rest.

        Args:
            q: ``[B, Hq, Tq, D]``.
            k: ``[B, Hk, Tk, D]``, with pages ``[P, Hk, page, D]``.
            rows: Default: the queries are the last of the keys; with pages there is none.
            scale: Default ``D ** -0.5``.
            more: The other attributes.

        Raises:
            TypeError: If sinks are not floating point, or pages no int32.
            ValueError: If shapes or devices do not fit, or softcap is not positive.
        """
        if rows is None and more.get("pages") is not None:
            raise ValueError(
                "pages do not say how many keys there are; give rows=, such as Rows.last(Tq, Tk)"
            )
        if rows is None:
            rows = Rows.last(q.shape[2], k.shape[2])
        options = cls(rows=rows, scale=q.shape[-1] ** -0.5 if scale is None else scale, **more)
        options._check_rows(q, k)
        if options.softcap is not None and not options.softcap > 0:
            raise ValueError(f"softcap must be positive, got {options.softcap}; None switches it off")
        if options.sinks is not None:
            options._check_sinks(options.sinks, q)
        return options

    @property
    def packed(self) -> bool:
        """Whether several sequences lie behind one another in one batch entry."""
        return self.rows.is_packed

    @property
    def packed_starts(self) -> dict[str, Tensor | None]:
        """What tells kernels where packed sequences lie; None if there are none."""
        return {"starts_q": self.rows.starts_q, "starts_k": self.rows.starts_k}

    @property
    def sequences(self) -> int:
        """Packed sequences, 0 if there are none."""
        return 0 if self.rows.starts_q is None else len(self.rows.starts_q) - 1

    def _check_rows(self, q: Tensor, k: Tensor) -> None:
        rows = self.rows
        if rows.num_queries != q.shape[2] or (self.pages is None and rows.num_keys > k.shape[2]):
            raise ValueError(
                f"rows are of {rows.num_queries} queries and {rows.num_keys} keys, but q has {q.shape[2]} "
                f"tokens and k {k.shape[2]}"
            )
        if rows.starts_q is not None:
            if q.shape[0] != 1:
                raise ValueError(f"packed sequences are one batch entry, q has {q.shape[0]}")
            if rows.starts_q.device != q.device:
                raise ValueError(f"rows are on {rows.starts_q.device}, q on {q.device}")
        if self.pages is not None:
            _check_whole(self.pages, "pages", "[S, N]" if self.packed else "[B, N]", q, self.sequences)
            # Of packed sequences whose lengths only the device knows nobody checks them.
            lengths = (rows.lengths or ()) if self.packed else rows.known
            longest, each = max([0, *(keys for _, keys in lengths)]), self.pages.shape[1]
            if longest > each * k.shape[2]:
                raise ValueError(
                    f"a sequence has {longest} keys, but pages has {each} of {k.shape[2]} tokens for each"
                )

    @staticmethod
    def _check_sinks(sinks: Tensor, q: Tensor) -> None:
        if not sinks.dtype.is_floating_point:
            raise TypeError(f"sinks must be floating point, got {sinks.dtype}")
        if tuple(sinks.shape) != (q.shape[1],):
            raise ValueError(f"sinks must be a logit per query head [{q.shape[1]}], got {list(sinks.shape)}")
        if sinks.device != q.device:
            raise ValueError(f"sinks are on {sinks.device}, q on {q.device}")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PoolOptions(Options):
    """The optional parts of one call of `pooled_attention`, whose arguments these are."""

    per_kv_head: bool = False
    pool: Pool = "max"

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"pool must be {' or '.join(POOLS)}, got {self.pool!r}")

    def merged(self, weights: Tensor, dim: int) -> Tensor:
        """Return what queries have of a KV block whose weights lie along a dimension."""
        return weights.sum(dim) if self.pool == "mass" else weights.amax(dim)

    def map_shape(self, q: Tensor, k: Tensor, block_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the shape of the map, ``[B, Hq or Hk, rows, columns]``."""
        return q.shape[0], (k if self.per_kv_head else q).shape[1], *self.rows.num_blocks(block_size)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ScoreOptions(Asked):
    """What one call of `score_blocks` asks for, whose arguments these are."""

    sub_blocks: tuple[int, int]
    scale: float
    rows: Rows | None = None
    block_size: tuple[int, int] = (64, 64)
    shares: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Tokens per summary of (queries, keys)."""
        (block_q, block_k), (subs_q, subs_k) = self.block_size, self.sub_blocks
        return block_q // subs_q, block_k // subs_k

    @property
    def past(self) -> int | None:
        """Keys before the first query; None scores every pair."""
        return None if self.rows is None else self.rows.first


def pool_places(pools: Sequence[str]) -> tuple[int, ...]:
    """Return where max, min and avg stand among the pools of a summary, -1 for those that are not wanted."""
    return tuple(pools.index(name) if name in pools else -1 for name in ("max", "min", "avg"))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SummaryOptions(Asked):
    """What one call of `summarise_blocks` asks for, whose arguments these are; ``rows`` only if packed."""

    size: int
    pools: tuple[str, ...]
    dtype: torch.dtype
    weight: Tensor | None = None
    merge: int = 1
    norm: Tensor | None = None
    eps: float = 1e-6
    rotary: tuple[Tensor, Tensor] | None = None
    rows: Rows | None = None
    rounded_to: torch.dtype | None = None

    @property
    def out_dtype(self) -> torch.dtype:
        """Of what is returned."""
        return self.rounded_to or self.dtype


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DecodeOptions(Options):
    """The optional parts of one call of `block_sparse_decode`; ``rows.num_keys`` is what the cache can hold.

    Attributes:
        lengths: int32 ``[B]``, keys of every sequence, its queries the last of them; None for a full cache.
        starts: int32 ``[B]``, where in k every sequence's first key lies; None where that is its beginning.
    """

    lengths: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, *, rows: Rows | None = None, scale: float | None = None, **more: Any
    ) -> Self:
        """Check what a caller gave and fill in the rest, as `Options.of`; ``rows`` follows from the cache."""
        pages = more.get("pages")
        capacity = k.shape[2] * (pages.shape[-1] if isinstance(pages, Tensor) else 1)
        if rows is None and capacity < q.shape[2]:
            raise ValueError(f"the cache holds {capacity} tokens, fewer than the {q.shape[2]} queries")
        return super().of(q, k, rows=rows or Rows.last(q.shape[2], capacity), scale=scale, **more)

    @property
    def page_tokens(self) -> int:
        """Tokens that lie behind one another: of a page, or of a whole sequence."""
        return self.rows.num_keys // (1 if self.pages is None else self.pages.shape[1])

    def held(self, batch: int) -> list[int]:
        """Return the keys of every sequence; waits for the device.

        Raises:
            ValueError: If there are more than the cache can hold, or fewer than none.
        """
        room = [self.rows.num_keys - start for start in self.first_keys(batch)]
        held = room if self.lengths is None else self.lengths.tolist()
        for length, most in zip(held, room, strict=True):
            if not 0 <= length <= most:
                raise ValueError(
                    f"lengths must be of 0 to {most} keys, what the cache can hold, got {length}"
                )
        return held

    def first_keys(self, batch: int) -> list[int]:
        """Return where in k every sequence's first key lies; waits for the device.

        Raises:
            ValueError: If it is outside of the cache.
        """
        most = self.rows.num_keys
        starts = [0] * batch if self.starts is None else self.starts.tolist()
        if wrong := [start for start in starts if not 0 <= start <= most]:
            raise ValueError(f"starts must be of 0 to {most}, the tokens of the cache, got {wrong[0]}")
        return starts

    def _check_rows(self, q: Tensor, k: Tensor) -> None:
        for name, shape in (("lengths", "[B]"), ("pages", "[B, N]"), ("starts", "[B]")):
            x: Tensor | None = getattr(self, name)
            if x is not None:
                _check_whole(x, name, shape, q)
        if self.pages is not None and self.starts is not None:
            raise ValueError("starts are of a cache without pages; a block table begins with the first key's")
        if self.pages is None and k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k holds {k.shape[0]} sequences, q {q.shape[0]}; a paged cache needs pages=, its block table"
            )
