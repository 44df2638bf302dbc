"""Pure PyTorch on any device: gather the selected K/V blocks of many rows and multiply them batched.

Rows (one query block of one head) that read the same number of blocks are computed together, so no
work is spent on padding, and only as many at a time as keep the gathered blocks and scores in a
CPU's last-level cache. Unselected blocks are never touched. Measurements: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seerattention.ops.attention_scores import by_block
from seerattention.ops.dispatch import runs_everything
from seerattention.ops.options import Options
from seerattention.ops.pages import in_vectors, take
from seerattention.rows import Rows, num_blocks
from seerattention.selection import BlockSelection

#: Bytes of gathered keys, values and scores per batched product; at least one row is taken.
WORK_BYTES = 8 * 2**20

unsupported = runs_everything


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    dim, rows = q.shape[3], options.rows
    block_q, block_k = selection.block_size
    queries = _to_blocks(q * options.scale, block_q, rows)
    keys, values = (_reader(x, block_k, options) for x in (k, v))
    out = torch.empty_like(queries)
    lse = queries.new_empty(queries.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for part in _parts(q, k, selection, options):
        shape = (len(part.group), part.blocks.shape[1] * block_k, dim)
        scores = part.scores(queries, keys(part.where).view(shape), selection, options)
        if options.sinks is not None:
            sinks = options.sinks.to(scores.dtype)[part.head, None, None].expand(-1, block_q, 1)
            scores = torch.cat([scores, sinks], -1)
        if options.return_lse:
            lse[part.group] = scores.to(lse.dtype).logsumexp(-1)
        share = torch.softmax(scores, dim=-1)[..., : shape[1]]
        out[part.group] = torch.bmm(share, values(part.where).view(shape))
    out = _from_blocks(out, q, rows)
    return out, _from_blocks(lse[..., None], q, rows)[..., 0] if options.return_lse else None


def backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: BlockSelection,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, and ``[B, Hq, Tq]`` with what sinks gain from each query.

    Rows are gathered as in `run`, their probabilities computed anew from ``lse``, and what they add to
    the blocks that they read is added there in the rows' order, in the dtype of ``lse``.
    """
    dim, rows = q.shape[3], options.rows
    block_q, block_k = selection.block_size
    wide = lse.dtype
    delta = (grad.to(wide) * out).sum(-1) - grad_lse
    queries, grads = _to_blocks(q * options.scale, block_q, rows), _to_blocks(grad, block_q, rows)
    keys, values = _to_blocks(k, block_k, rows), _to_blocks(v, block_k, rows)
    shift, deltas = (_to_blocks(x[..., None], block_q, rows) for x in (lse, delta))
    dq = torch.empty_like(queries)
    dk, dv = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
    for part in _parts(q, k, selection, options):
        shape = (len(part.group), part.blocks.shape[1] * block_k, dim)
        key, value = (x.index_select(0, part.where).view(shape) for x in (keys, values))
        query, g = queries[part.group], grads[part.group]
        scores = part.scores(queries, key, selection, options).to(wide)
        share = torch.exp(scores - shift[part.group])
        dscores = torch.bmm(g, value.mT).to(wide).sub_(deltas[part.group]).mul_(share)
        if options.softcap is not None:
            # Where the mask made it infinite, the share is zero already.
            slope = 1 - (scores / options.softcap).square_()
            dscores.mul_(slope.masked_fill_(share == 0, 0))
        share, dscores = share.to(q.dtype), dscores.to(q.dtype)
        dq[part.group] = torch.bmm(dscores, key) * options.scale
        for total, weights, x in ((dk, dscores, query), (dv, share, g)):
            total.index_add_(0, part.where, torch.bmm(weights.mT, x).view(-1, block_k, dim).to(wide))
    dq, dk, dv = (_from_blocks(x, like, rows).to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, delta


@dataclass(frozen=True)
class _Part:
    """Rows that are computed together.

    Attributes:
        group: Numbers of the rows, ``[n]``.
        head: Their query heads.
        first: Position of each one's first query.
        blocks: The KV blocks that they read, ``[n, blocks]``.
        where: The same among the blocks of all heads, flat.
        masked: How many of the last blocks hold keys later than a row's first query.
    """

    group: Tensor
    head: Tensor
    first: Tensor
    blocks: Tensor
    where: Tensor
    masked: int

    def scores(self, queries: Tensor, keys: Tensor, selection: BlockSelection, options: Options) -> Tensor:
        """Return the rows' scores ``[n, block_q, blocks * block_k]``, capped, acausal ones minus infinity."""
        scores = torch.bmm(queries[self.group], keys.mT)
        if options.softcap is not None:
            scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
        if self.masked:
            columns = self.masked * selection.block_size[1]
            late = self.blocks[:, -self.masked :]
            hidden = _hidden(late, self.first, *selection.block_size)
            scores[:, :, -columns:].masked_fill_(hidden, float("-inf"))
        return scores


def _parts(q: Tensor, k: Tensor, selection: BlockSelection, options: Options) -> Iterator[_Part]:
    """Yield the rows of equal length together, as many at a time as fit into ``WORK_BYTES``."""
    batch, heads = q.shape[:2]
    block_q, block_k = selection.block_size
    nq, nk = selection.shape[2:]
    first, last, begin, end = _places(options.rows, selection.block_size, q.device)
    rows = torch.arange(batch * heads * nq, device=q.device)
    b, h, i = rows // (heads * nq), rows // nq % heads, rows % nq
    list_row = b * (selection.shape[0] > 1)
    list_row = (list_row * selection.shape[1] + h // (heads // selection.shape[1])) * nq + i
    first_kv = (b * k.shape[1] + h // (heads // k.shape[1])) * end + begin[i]
    offsets, indices = selection.rows()
    starts, counts = offsets[list_row], offsets.diff()[list_row]
    # Own blocks are always selected, and they alone hold keys later than a row's first query, which need a
    # mask: as many as KV blocks between the row's first and last query.
    late = (last // block_k - first // block_k + 1)[i]
    order = torch.argsort(counts * (nk + 1) + late, stable=True)
    for start, stop, count, masked in _equal_parts(
        counts[order].tolist(), late[order].tolist(), block_q, block_k, q
    ):
        group = order[start:stop]
        blocks = indices[starts[group, None] + torch.arange(count, device=q.device)].long()
        where = (blocks + first_kv[group, None]).flatten()
        yield _Part(group, h[group], first[i[group]], blocks, where, masked)


def _places(
    rows: Rows, block_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return every row's first and last position and its sequence's first KV block; how many there are."""
    block_q, block_k = block_size
    found, end = [], 0
    for queries, keys in rows.known:
        first = torch.arange(keys - queries, keys, block_q)
        found.append(torch.stack((first, (first + block_q).clamp(max=keys) - 1, torch.full_like(first, end))))
        end += num_blocks(keys, block_k)
    first, last, begin = torch.cat(found, 1).to(device)
    return first, last, begin, end


def _in_blocks(rows: Rows, tokens: int, size: int, device: torch.device) -> Tensor:
    """Return where packed tokens are once every sequence ends with a whole block, int64 ``[T]``."""

    def make() -> Tensor:
        both = zip(rows.places(tokens), rows.places(tokens, size), strict=True)
        return torch.cat([torch.arange(one.stop - one.start) + block.start * size for one, block in both])

    return rows.kept(("in blocks", tokens, size), device, make)


def _reader(x: Tensor, size: int, options: Options) -> Callable[[Tensor], Tensor]:
    """Return what gives blocks by their numbers among those of all heads, ``[n]`` -> ``[n, size, D]``."""
    rows, heads = options.rows, x.shape[1]
    if options.pages is None:
        blocks = _to_blocks(x, size, rows)
        return lambda where: blocks.index_select(0, where)
    x, table = in_vectors(x), options.pages.long()
    pages, places = [], []
    for own, (_, keys) in zip(table.split(1) if rows.is_packed else [table], rows.known, strict=True):
        # What follows the last key, which may be anything, is the last key again; no query sees it there.
        token = torch.arange(num_blocks(keys, size) * size, device=x.device).clamp(max=keys - 1)
        pages.append(own[:, token // x.shape[2]])
        places.append(token % x.shape[2])
    page, place = torch.cat(pages, 1).unflatten(1, (-1, size)), torch.cat(places).view(-1, size)

    def read(where: Tensor) -> Tensor:
        head, block = where // len(place), where % len(place)
        return take(x, page[head // heads, block], (head % heads)[:, None], place[block])

    return read


def _to_blocks(x: Tensor, size: int, rows: Rows) -> Tensor:
    """Cut ``[B, H, T, D]`` into ``[B * H * N, size, D]``, zeros after a sequence's last token."""
    if rows.is_packed:
        blocks = rows.places(x.shape[2], size)[-1].stop
        padded = x.new_zeros(x.shape[1], blocks * size, x.shape[3])
        padded[:, _in_blocks(rows, x.shape[2], size, x.device)] = x[0]
        return padded.view(-1, size, x.shape[3])
    return by_block(x, size, 2).flatten(0, 2)


def _from_blocks(x: Tensor, like: Tensor, rows: Rows) -> Tensor:
    """Undo `_to_blocks`: ``[B * H * N, size, E]`` -> ``[B, H, T, E]``."""
    batch, heads, tokens = like.shape[:3]
    size, x = x.shape[1], x.view(batch, heads, -1, x.shape[2])
    return x[:, :, _in_blocks(rows, tokens, size, x.device)] if rows.is_packed else x[:, :, :tokens]


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


def _hidden(lists: Tensor, first: Tensor, block_q: int, block_k: int) -> Tensor:
    """Mark the acausal pairs in rows' last blocks, bool ``[rows, block_q, blocks * block_k]``."""
    device = lists.device
    key = (lists[:, :, None] * block_k + torch.arange(block_k, device=device)).flatten(1)
    query = first[:, None] + torch.arange(block_q, device=device)
    return key[:, None, :] > query[:, :, None]
