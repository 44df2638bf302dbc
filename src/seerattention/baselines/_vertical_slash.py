"""Shares of columns and diagonals of the attention map, estimated from the last queries."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Smallest estimate, so that every block that may be read has a finite logarithm.
TINY = torch.finfo(torch.float32).tiny


def estimate(q: Tensor, k: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Estimate the vertical and slash lines of each head from its last queries.

    Memory grows with the number of keys: one KV head's last queries are taken at a time.

    Args:
        q: ``[B, Hq, Tq, D]``, the last ``Tq`` of ``Tk`` tokens.
        k: ``[B, Hk, Tk, D]``.
        last: Queries to estimate from; all of them if there are fewer.

    Returns:
        ``vertical``, fp32 ``[B, Hq, Tk]``: mean attention weight of each key; and ``slash``, the same
        shape: summed weight of the keys ``o`` tokens back over the number of queries, at place ``o``.
        Both sum to 1.
    """
    part = q[:, :, -last:].float().unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
    rows, keys = part.shape[3], k.shape[2]
    later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    vertical = torch.empty(*q.shape[:2], keys, dtype=torch.float32, device=q.device)
    slash = torch.empty_like(vertical)
    verticals, slashes = (x.unflatten(1, (k.shape[1], -1)) for x in (vertical, slash))
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            scores = part[b, h] @ k[b, h].float().mT
            scores[..., keys - rows :].masked_fill_(later, -math.inf)
            share = torch.softmax(scores, -1)
            verticals[b, h] = share.mean(-2)
            slashes[b, h] = _by_distance(share).mean(-2)
    return vertical, slash


def _by_distance(share: Tensor) -> Tensor:
    """Turn columns ``[G, n, Tk]`` of the last ``n`` rows of a causal map into distances back."""
    rows, keys = share.shape[-2:]
    # Reversed, row r holds distance o at column o + rows - 1 - r: a view of rows one shorter lines them up.
    flat = F.pad(share.flip(-1), (0, rows)).flatten(-2)[..., rows - 1 : -1]
    return flat.unflatten(-1, (rows, keys + rows - 1))[..., :keys]
