"""Pure PyTorch on any device: gather the selected K/V blocks of many rows and multiply them batched.

Rows (one query block of one head) that read the same number of blocks are computed together, so no
work is spent on padding, and only as many at a time as keep the gathered blocks and scores in a
CPU's last-level cache. Unselected blocks are never touched. Measurements: docs/kernels.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.block_sparse_attention._options import Options
from seerattention.selection import BlockSelection

#: Bytes of gathered keys, values and scores per batched product; at least one row is taken.
WORK_BYTES = 8 * 2**20


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = []
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        reasons.append(
            "it writes its output in place and has no backward; use backend='reference' for gradients"
        )
    if options.packed:
        reasons.append("it takes no packed sequences (cu_seqlens_q, cu_seqlens_k)")
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    batch, heads, num_queries, dim = q.shape
    block_q, block_k = selection.block_size
    nq, nk = selection.shape[2:]
    past = k.shape[2] - num_queries
    queries = _to_blocks(q * options.scale, block_q)
    keys, values = _to_blocks(k, block_k), _to_blocks(v, block_k)
    out = torch.empty_like(queries)
    lse = queries.new_empty(queries.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))

    rows = torch.arange(batch * heads * nq, device=q.device)
    b, h, i = rows // (heads * nq), rows // nq % heads, rows % nq
    list_row = b * (selection.shape[0] > 1)
    list_row = (list_row * selection.shape[1] + h // (heads // selection.shape[1])) * nq + i
    first_kv = (b * k.shape[1] + h // (heads // k.shape[1])) * nk
    offsets, indices = selection.rows()
    starts, counts = offsets[list_row], offsets.diff()[list_row]
    # How many of a row's last blocks hold tokens later than its first query: those need a mask.
    late = _late_blocks(selection, nq, nk, past, num_queries)[i]
    order = torch.argsort(counts * (nk + 1) + late, stable=True)

    for part in _equal_parts(counts[order].tolist(), late[order].tolist(), block_q, block_k, q):
        group, count, masked = order[part[0] : part[1]], part[2], part[3]
        lists = indices[starts[group, None] + torch.arange(count, device=q.device)].long()
        where = (lists + first_kv[group, None]).flatten()
        shape = (len(group), count * block_k, dim)
        scores = torch.bmm(queries[group], keys.index_select(0, where).view(shape).mT)
        if options.softcap is not None:
            scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
        if masked:
            columns = masked * block_k
            hidden = _hidden(lists[:, -masked:], i[group], block_q, block_k, past)
            scores[:, :, -columns:].masked_fill_(hidden, float("-inf"))
        if options.sinks is not None:
            sinks = options.sinks.to(scores.dtype)[h[group], None, None].expand(-1, block_q, 1)
            scores = torch.cat([scores, sinks], -1)
        if options.return_lse:
            lse[group] = scores.to(lse.dtype).logsumexp(-1)
        share = torch.softmax(scores, dim=-1)[..., : count * block_k]
        out[group] = torch.bmm(share, values.index_select(0, where).view(shape))
    out = out.view(batch, heads, nq * block_q, dim)[:, :, :num_queries]
    return (out, lse.view(batch, heads, -1)[:, :, :num_queries]) if options.return_lse else out


def _to_blocks(x: Tensor, size: int) -> Tensor:
    """Cut ``[B, H, T, D]`` into ``[B * H * N, size, D]``, zeros after the last token."""
    missing = -x.shape[2] % size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, size, x.shape[3])


def _late_blocks(selection: BlockSelection, nq: int, nk: int, past: int, num_queries: int) -> Tensor:
    """Bound the selected blocks per row that reach past the row's first query, int64 ``[Nq]``.

    Own blocks are always selected, and they are the only ones that reach past the first query; there
    are as many as KV blocks between the row's first and last query.
    """
    block_q, block_k = selection.block_size
    first = past + block_q * torch.arange(nq, device=selection.bits.device)
    last = (first + block_q).clamp(max=past + num_queries) - 1
    return last // block_k - first // block_k + 1


def _equal_parts(
    counts: list[int], late: list[int], block_q: int, block_k: int, q: Tensor
) -> list[tuple[int, int, int, int]]:
    """Split sorted rows into (start, end, blocks, masked blocks) of equal rows within ``WORK_BYTES``."""
    parts, start = [], 0
    while start < len(counts):
        count, masked = counts[start], late[start]
        row_bytes = q.element_size() * count * block_k * (2 * q.shape[3] + 2 * block_q)
        end = start + 1
        limit = start + max(1, WORK_BYTES // row_bytes)
        while end < min(limit, len(counts)) and (counts[end], late[end]) == (count, masked):
            end += 1
        parts.append((start, end, count, masked))
        start = end
    return parts


def _hidden(lists: Tensor, rows: Tensor, block_q: int, block_k: int, past: int) -> Tensor:
    """Mark the acausal pairs in rows' last blocks, bool ``[rows, block_q, blocks * block_k]``."""
    device = lists.device
    key = (lists[:, :, None] * block_k + torch.arange(block_k, device=device)).flatten(1)
    query = past + rows[:, None] * block_q + torch.arange(block_q, device=device)
    return key[:, None, :] > query[:, :, None]
