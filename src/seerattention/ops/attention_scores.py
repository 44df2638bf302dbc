"""True attention of some queries, and what every block gets of it, without the whole map in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.dispatch import outside_autocast
from seerattention.rows import Rows

#: Bytes of scores held at a time (fp32): what a CPU's cache takes, and what fills a GPU.
WORK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}


@outside_autocast
def attention_scores(
    q: Tensor, k: Tensor, positions: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Return what attention takes the softmax of, for some queries of one sequence; sinks are no part of it.

    Args:
        q: ``[..., Hq, R, D]``.
        k: ``[..., Hk, T, D]``.
        positions: int64 ``[R]``, of the queries; later keys get -inf.
        scale: Softmax scale.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None leaves them alone.

    Returns:
        ``[..., Hq, R, T]``; fp32, of fp64 inputs fp64.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    # Heads of a group meet their shared keys in one product.
    grouped = q.unflatten(-3, (k.shape[-3], -1)).flatten(-3, -2).to(work) * scale
    scores = (grouped @ k.to(work).mT).unflatten(-2, (-1, q.shape[-2])).flatten(-4, -3)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    later = torch.arange(k.shape[-2], device=k.device) > positions[:, None]
    return scores.masked_fill_(later, float("-inf"))


def by_block(x: Tensor, size: int, dim: int = -1, fill: float = 0.0) -> Tensor:
    """Split a dimension into blocks of ``size`` and their entries, ``fill`` behind a short last one."""
    after, short = -1 - dim if dim < 0 else x.dim() - 1 - dim, -x.shape[dim] % size
    if short:
        x = F.pad(x, (*(0, 0) * after, 0, short), value=fill)
    return x.unflatten(dim, (-1, size))


def block_mass(
    q: Tensor, k: Tensor, block_size: tuple[int, int], *, scale: float, softcap: float | None = None
) -> Tensor:
    """Return the attention that every block gets of the queries of a row.

    Args:
        q: ``[B, Hq, Tq, D]``, the last of the keys' tokens.
        k: ``[B, Hk, Tk, D]``.
        block_size: Tokens per (query block, KV block).
        scale: Softmax scale.
        softcap: As `attention_scores` takes it. Sinks are left out: mass that no key can have is no loss.

    Returns:
        fp32 ``[B, Hq, Nq, Nk]``; a row sums to the number of its queries.
    """
    rows = Rows.last(q.shape[2], k.shape[2])
    groups, (block_q, block_k) = q.shape[1] // k.shape[1], block_size
    out = q.new_zeros(*q.shape[:2], *rows.num_blocks(block_size), dtype=torch.float32)
    budget = WORK_BYTES["cpu" if q.device.type == "cpu" else "cuda"]
    step = max(1, budget // (4 * groups * rows.num_keys * block_q))
    positions = rows.positions(q.device)
    for b in range(q.shape[0]):
        for h in range(k.shape[1]):
            heads = slice(h * groups, (h + 1) * groups)
            for first in range(0, out.shape[2], step):
                part = slice(first * block_q, min((first + step) * block_q, rows.num_queries))
                keys = k[b, h : h + 1, : rows.first + part.stop]
                scores = attention_scores(
                    q[b, heads, part], keys, positions[part], scale=scale, softcap=softcap
                )
                sums = by_block(by_block(scores.softmax(-1), block_k).sum(-1), block_q, 1).sum(2)
                out[b, heads, first : first + step, : sums.shape[2]] = sums
    return out
