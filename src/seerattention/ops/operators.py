"""Operators of torch, which take no objects: what they are told of a call, and what they return of it.

A compiler sees an operator's shapes and gradient and no kernels. A call of one costs tens of microseconds,
which only compilers and gradients need to spend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seerattention.ops.options import Options
from seerattention.rows import Rows

#: The options in an operator's schema, as `flatten` returns them.
FLAT = "int[] lengths, float scale, float? softcap, Tensor? sinks, Tensor? starts_q, Tensor? starts_k"


def flatten(options: Options) -> tuple[Any, ...]:
    """Take apart what every attention op may be asked for, but for ``return_lse``."""
    rows, lengths = options.rows, [n for one in options.rows.lengths or () for n in one]
    return lengths, options.scale, options.softcap, options.sinks, rows.starts_q, rows.starts_k


def unflatten(num_queries: int, num_keys: int, given: tuple[Any, ...]) -> dict[str, Any]:
    """Put together again what `flatten` took apart of so many queries and keys."""
    lengths, scale, softcap, sinks, starts_q, starts_k = given
    pairs = tuple(zip(lengths[::2], lengths[1::2], strict=True))
    rows = Rows(num_queries, num_keys, starts_q, starts_k, pairs or None)
    return {"rows": rows, "scale": scale, "softcap": softcap, "sinks": sinks}


def told(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Return an output and logarithms of the shapes and strides that a compiler is told."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=wide)


def as_told(q: Tensor, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a backend's output and logarithms as `told` says, whatever its own strides; empty for None."""
    nothing = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(0) if out is None else like(out, q), nothing if lse is None else lse.contiguous()


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return ``x`` with the strides of ``torch.empty_like(other)``."""
    same = x.stride() == torch.empty_like(other, device="meta").stride()
    return x if same else torch.empty_like(other).copy_(x)
