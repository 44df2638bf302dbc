"""Exact and bounded in memory: a slice of query blocks at a time, against their causal keys only.

The scores of a slice and their softmax take at most ``WORK_BYTES`` each, whatever the length; the
output comes from the same pass.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.selection import num_blocks

#: Bytes of scores held at a time (fp32); at least one query block of one head is taken. Small enough for
#: a CPU's cache (64 MB was four times slower on 2 cores, docs/kernels.md), large enough to fill a GPU.
WORK_BYTES = 8 * 2**20
CUDA_WORK_BYTES = 512 * 2**20


def unsupported(q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int]) -> list[str]:
    """Return the reasons why this backend cannot run; it runs everything."""
    return []


def run(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], *, scale: float
) -> tuple[Tensor | None, Tensor]:
    """Return the output (None without v) and the row-normalised block-max map."""
    batch, heads, tokens_q = q.shape[:3]
    kv_heads, tokens_k = k.shape[1:3]
    block_q, block_k = block_size
    nq, nk = num_blocks(tokens_q, block_q), num_blocks(tokens_k, block_k)
    past = tokens_k - tokens_q
    budget = CUDA_WORK_BYTES if q.is_cuda else WORK_BYTES
    work = torch.promote_types(q.dtype, torch.float32)
    target = torch.zeros(batch, heads, nq, nk, dtype=torch.float32, device=q.device)
    out = None if v is None else torch.empty_like(q)
    # Heads of a group meet their shared keys in one product: [B, Hk, G * rows, D] x [B, Hk, D, Tk].
    grouped = q.unflatten(1, (kv_heads, -1))
    for b in range(batch):
        for h in range(kv_heads):
            first = 0
            while first < nq:
                fits = _slice_blocks(budget, grouped.shape[2], block_q, past + first * block_q)
                last = min(nq, first + fits)
                rows = slice(first * block_q, min(last * block_q, tokens_q))
                seen = min(tokens_k, past + rows.stop)
                part = grouped[b, h, :, rows].to(work) * scale
                scores = part @ k[b, h, :seen].to(work).mT
                # Every row of the slice sees all keys before the slice; only the slice's own need a mask.
                own = scores[:, :, past + rows.start :]
                hidden = torch.ones(own.shape[1:], dtype=torch.bool, device=q.device).triu(1)
                own.masked_fill_(hidden, float("-inf"))
                share = torch.softmax(scores, -1)
                pooled = _block_max(share, block_size)
                target.unflatten(1, (kv_heads, -1))[b, h, :, first:last, : pooled.shape[2]] = pooled
                if out is not None and v is not None:
                    mixed = share @ v[b, h, :seen].to(work)
                    out.unflatten(1, (kv_heads, -1))[b, h, :, rows] = mixed.to(out.dtype)
                first = last
    return out, target / target.sum(-1, keepdim=True)


def _slice_blocks(budget: int, groups: int, block_q: int, seen: int) -> int:
    """Query blocks whose scores fit ``budget`` bytes, ``seen`` keys before the first of them; at least 1.

    ``n`` blocks have ``n * block_q`` rows and see ``seen + n * block_q`` keys: the largest ``n`` solves
    a quadratic equation.
    """
    area = budget // (4 * groups * block_q)
    return max(1, (math.isqrt(seen * seen + 4 * block_q * area) - seen) // (2 * block_q))


def _block_max(share: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Max-pool ``[G, rows, columns]`` to ``[G, N, M]``; short last blocks count what they have."""
    for dim, size in ((-1, block_size[1]), (-2, block_size[0])):
        missing = -share.shape[dim] % size
        if missing:
            share = F.pad(share, (0, missing) if dim == -1 else (0, 0, 0, missing))
        share = share.unflatten(dim, (-1, size)).amax(dim)
    return share.float()
