"""Exact and bounded in memory: a slice of query blocks at a time, against their causal keys only.

The scores of a slice and their softmax take at most ``WORK_BYTES`` each, whatever the length; the
output comes from the same pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.selection import num_blocks

#: Bytes of scores held at a time (fp32) per device type; at least one query block of one head is taken.
#: On a CPU small enough for its cache (64 MB was four times slower on 2 cores, docs/kernels.md); on a
#: GPU large enough to fill it.
WORK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}


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
    budget = WORK_BYTES.get(q.device.type, WORK_BYTES["cpu"])
    work = torch.promote_types(q.dtype, torch.float32)
    target = torch.zeros(batch, heads, nq, nk, dtype=torch.float32, device=q.device)
    out = None if v is None else torch.empty_like(q)
    # Heads of a group meet their shared keys in one product: [B, Hk, G * rows, D] x [B, Hk, D, Tk].
    grouped = q.unflatten(1, (kv_heads, -1))
    for b in range(batch):
        for h in range(kv_heads):
            first = 0
            while first < nq:
                seen = min(tokens_k, past + (first + 1) * block_q)
                row_bytes = 4 * grouped.shape[2] * block_q * (seen + block_k)
                # Later rows of the slice see more keys; half the budget leaves room for them.
                last = min(nq, first + max(1, budget // 2 // row_bytes))
                rows = slice(first * block_q, min(last * block_q, tokens_q))
                seen = min(tokens_k, past + rows.stop)
                part = grouped[b, h, :, rows].to(work) * scale
                scores = part @ k[b, h, :seen].to(work).mT
                hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
                scores.masked_fill_(hidden.triu(1 + past + rows.start), float("-inf"))
                share = torch.softmax(scores, -1)
                pooled = _block_max(share, block_size)
                target.unflatten(1, (kv_heads, -1))[b, h, :, first:last, : pooled.shape[2]] = pooled
                if out is not None and v is not None:
                    mixed = share @ v[b, h, :seen].to(work)
                    out.unflatten(1, (kv_heads, -1))[b, h, :, rows] = mixed.to(out.dtype)
                first = last
    return out, target / target.sum(-1, keepdim=True)


def _block_max(share: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Max-pool ``[G, rows, columns]`` to ``[G, N, M]``; short last blocks count what they have."""
    for dim, size in ((-1, block_size[1]), (-2, block_size[0])):
        missing = -share.shape[dim] % size
        if missing:
            share = F.pad(share, (0, missing) if dim == -1 else (0, 0, 0, missing))
        share = share.unflatten(dim, (-1, size)).amax(dim)
    return share.float()
