"""Exact and bounded in memory: a slice of query blocks at a time, against their causal keys only.

The scores of a slice and their softmax take at most ``WORK_BYTES`` each, whatever the length; the
output comes from the same pass.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from seerattention.ops.attention_scores import by_block
from seerattention.ops.dispatch import runs_everything
from seerattention.ops.options import PoolOptions
from seerattention.rows import num_blocks

#: Bytes of scores held at a time (fp32); at least one query block of one head is taken. Small enough for
#: a CPU's cache (64 MB was four times slower on 2 cores, docs/kernels.md), large enough to fill a GPU.
WORK_BYTES = 8 * 2**20
CUDA_WORK_BYTES = 512 * 2**20

unsupported = runs_everything


def run(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the output (None without v), the row-normalised map of blocks, and lse (None unless asked)."""
    target = torch.zeros(options.map_shape(q, k, block_size), dtype=torch.float32, device=q.device)
    out = None if v is None else torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    row, sinks = 0, options.sinks
    for one in options.rows.sequences():
        rows = slice(row, row + num_blocks(one.rows.num_queries, block_size[0]))
        for b in range(q.shape[0]):
            for h in range(k.shape[1]):
                # Heads of a group meet their shared keys in one product: [G * rows, D] x [D, Tk].
                heads = slice(h * (q.shape[1] // k.shape[1]), (h + 1) * (q.shape[1] // k.shape[1]))
                _attend(
                    q[b, heads, one.queries],
                    k[b, h, one.keys],
                    None if v is None else v[b, h, one.keys],
                    None if out is None else out[b, heads, one.queries],
                    target[b, slice(h, h + 1) if options.per_kv_head else heads, rows],
                    lse[b, heads, one.queries],
                    block_size,
                    replace(options, rows=one.rows, sinks=None if sinks is None else sinks[heads]),
                )
        row = rows.stop
    target /= target.sum(-1, keepdim=True)
    return out, target, lse if options.return_lse else None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor | None,
    target: Tensor,
    lse: Tensor,
    block_size: tuple[int, int],
    options: PoolOptions,
) -> None:
    """Fill output, undivided map and lse of a group of heads ``[G, Tq, D]`` in one sequence."""
    past = options.rows.first
    budget = CUDA_WORK_BYTES if q.is_cuda else WORK_BYTES
    work = torch.promote_types(q.dtype, torch.float32)
    block_q, first, last = block_size[0], 0, num_blocks(q.shape[1], block_size[0])
    while first < last:
        until = min(last, first + _slice_blocks(budget, q.shape[0], block_q, past + first * block_q))
        rows = slice(first * block_q, min(until * block_q, q.shape[1]))
        seen = past + rows.stop
        scores = (q[:, rows].to(work) * options.scale) @ k[:seen].to(work).mT
        if options.softcap is not None:
            scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
        # Every row of the slice sees all keys before the slice; only the slice's own need a mask.
        own = scores[:, :, past + rows.start :]
        hidden = torch.ones(own.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        own.masked_fill_(hidden, float("-inf"))
        if options.sinks is not None:
            sinks = options.sinks.to(work)[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat([scores, sinks], -1)
        if options.return_lse:
            lse[:, rows] = scores.logsumexp(-1)
        share = torch.softmax(scores, -1)[..., :seen]
        pooled = options.merged(by_block(share, block_size[1]), -1)
        pooled = by_block(pooled, block_q, -2).amax(-2)
        if options.per_kv_head:
            pooled = pooled.amax(0, keepdim=True)
        target[:, first:until, : pooled.shape[2]] = pooled
        if out is not None and v is not None:
            out[:, rows] = (share @ v[:seen].to(work)).to(out.dtype)
        first = until


def _slice_blocks(budget: int, groups: int, block_q: int, seen: int) -> int:
    """Query blocks whose scores fit ``budget`` bytes, ``seen`` keys before the first of them; at least 1.

    ``n`` blocks have ``n * block_q`` rows and see ``seen + n * block_q`` keys: the largest ``n`` solves
    a quadratic equation.
    """
    area = budget // (4 * groups * block_q)
    return max(1, (math.isqrt(seen * seen + 4 * block_q * area) - seen) // (2 * block_q))
