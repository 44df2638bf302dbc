"""What a call of an attention op may ask for besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from seerattention.selection import num_blocks


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Options:
    """The optional parts of one call, as every backend gets them.

    Attributes:
        scale: Softmax scale.
        softcap: Scores become ``softcap * tanh(scores * scale / softcap)``; None leaves them alone.
        sinks: Floating point ``[Hq]``, a logit per head that takes part in the softmax's denominator
            only.
        return_lse: Also return the logarithm of the softmax's denominator.
        cu_seqlens_q: int32 ``[S + 1]``, where each packed sequence's queries start, and the end.
        cu_seqlens_k: int32 ``[S + 1]``, the same of the keys.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    return_lse: bool = False
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether several sequences lie behind one another in one batch entry."""
        return self.cu_seqlens_q is not None

    def __repr__(self) -> str:
        """Name what differs from the defaults, tensors by their shape: values may be on a device."""
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                is_tensor = isinstance(value, Tensor)
                shown.append(f"{field.name}={list(value.shape) if is_tensor else value}")
        return f"Options({', '.join(shown)})"

    def check(self, q: Tensor, k: Tensor) -> None:
        """Check that the options fit the tensors, without looking at values on a device.

        Args:
            q: ``[B, Hq, Tq, D]``.
            k: ``[B, Hk, Tk, D]``.

        Raises:
            TypeError: If sinks or lengths have another dtype.
            ValueError: If shapes or devices do not fit, or softcap is not positive.
        """
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; None switches it off")
        if self.sinks is not None:
            self._check_sinks(self.sinks, q)
        starts = {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}
        given = {name: x for name, x in starts.items() if x is not None}
        if len(given) == 1:
            raise ValueError(f"packed sequences need both cu_seqlens, got only {next(iter(given))}")
        for name, x in given.items():
            if x.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {x.dtype}")
            if x.dim() != 1 or len(x) < 2 or x.shape != given["cu_seqlens_q"].shape:
                shapes = " and ".join(str(list(t.shape)) for t in given.values())
                raise ValueError(f"cu_seqlens must both be [S + 1] for S >= 1 sequences, got {shapes}")
            if x.device != q.device:
                raise ValueError(f"{name} is on {x.device}, q on {q.device}")
        if given and q.shape[0] != 1:
            raise ValueError(f"packed sequences are one batch entry, q has {q.shape[0]}")

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
    """The optional parts of one call, as every backend gets them.

    Attributes:
        per_kv_head: One map per KV head, for gates that choose for a whole group of query heads.
        lengths: (queries, keys) of every packed sequence, read from ``cu_seqlens``; empty if there are
            none.
    """

    per_kv_head: bool = False
    lengths: tuple[tuple[int, int], ...] = ()

    def map_shape(self, q: Tensor, k: Tensor, block_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the shape of the map, ``[B, Hq or Hk, rows, columns]``."""
        lengths = self.lengths or ((q.shape[2], k.shape[2]),)
        rows = sum(num_blocks(queries, block_size[0]) for queries, _ in lengths)
        columns = num_blocks(max(keys for _, keys in lengths), block_size[1])
        return q.shape[0], (k if self.per_kv_head else q).shape[1], rows, columns


def read_lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """Return (queries, keys) of every packed sequence; waits for the device.

    Raises:
        ValueError: If the sequences are not all of q and k, or one has more queries than keys.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, ends, tokens in (("q", ends_q, q.shape[2]), ("k", ends_k, k.shape[2])):
        if ends[0] != 0 or ends[-1] != tokens:
            raise ValueError(
                f"cu_seqlens_{name} must start with 0 and end with the {tokens} tokens of {name}, "
                f"got {ends[0]} to {ends[-1]}"
            )
    lengths = [(ends_q[i + 1] - ends_q[i], ends_k[i + 1] - ends_k[i]) for i in range(len(ends_q) - 1)]
    for i, (queries, keys) in enumerate(lengths):
        if not 0 <= queries <= keys:
            raise ValueError(
                f"sequence {i} has {queries} queries and {keys} keys; it needs 0 <= queries <= keys"
            )
    return lengths
