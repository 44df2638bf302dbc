"""The specification in slices of rows of bounded size, each against the blocks that it sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seerattention.ops.dispatch import runs_everything
from seerattention.ops.options import ScoreOptions
from seerattention.ops.score_blocks._sub_blocks import (
    max_over_sub_blocks,
    shares_by_keys,
    shares_of_sub_blocks,
)
from seerattention.rows import num_blocks

#: Products are reduced to block scores in slices of at most this many bytes.
SLICE_BYTES = 16 * 2**20

unsupported = runs_everything


def run(queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:
    """Return the scores. A slice's products are computed again in the backward pass."""
    (subs_q, subs_k), rows, block_size = options.sub_blocks, options.rows, options.block_size
    down, across = num_blocks(queries.shape[2], subs_q), num_blocks(keys.shape[2], subs_k)
    dtype = torch.promote_types(queries.dtype, torch.float32)
    # Once, before slices: theirs is then one sum in fp32, and scaling the queries is cheaper than the scores.
    queries, keys = queries.to(dtype) * options.scale, keys.to(dtype)
    valid = None if rows is None else rows.causal(block_size, queries.device)
    row_bytes = dtype.itemsize * queries.shape[0] * queries.shape[1] * subs_q * keys.shape[2]
    step = max(1, SLICE_BYTES // row_bytes)
    learns = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    parts = []
    for start in range(0, down, step):
        part = slice(start, min(start + step, down))
        seen = across
        if rows is not None:
            last_query = rows.first + min(part.stop * block_size[0], rows.num_queries) - 1
            seen = last_query // block_size[1] + 1
        given = queries[:, :, part.start * subs_q : part.stop * subs_q]
        shown = keys[:, :, : seen * subs_k]
        args = (given, shown, options, part.start, None if valid is None else valid[part], across)
        parts.append(
            checkpoint(_slice, *args, use_reentrant=False, preserve_rng_state=False)
            if learns
            else _slice(*args)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _slice(
    queries: Tensor, keys: Tensor, options: ScoreOptions, first: int, valid: Tensor | None, across: int
) -> Tensor:
    """Score the rows from ``first`` on against the blocks that they see; the columns after these are 0."""
    # A head's query summaries meet the key summaries of its group.
    heads, length = queries.shape[1:3]
    queries = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    by_head = heads // keys.shape[1], length
    seen = None
    if options.shares and options.rows is not None:
        seen = _seen(options, first * options.sub_blocks[0], length, keys)
    if options.shares and not (queries.requires_grad or keys.requires_grad):
        products = (keys @ queries.mT).unflatten(3, by_head)
        if seen is not None:
            # All before what the first one sees last is seen by all.
            begin = ((options.past or 0) + options.size[0] * (first * options.sub_blocks[0])) // options.size[
                1
            ]
            products[:, :, begin:].masked_fill_(~seen.mT[begin:, None], float("-inf"))
        scores = shares_by_keys(products, *options.sub_blocks).flatten(1, 2)
    else:
        products = (queries @ keys.mT).unflatten(2, by_head)
        if options.shares:
            scores = shares_of_sub_blocks(products, seen, *options.sub_blocks).flatten(1, 2)
        else:
            scores = max_over_sub_blocks(products, *options.sub_blocks).flatten(1, 2)
    if valid is None:
        return scores
    scores = scores.masked_fill(~valid[:, : scores.shape[3]], 0)
    return nn.functional.pad(scores, (0, across - scores.shape[3]))


def _seen(options: ScoreOptions, first: int, count: int, keys: Tensor) -> Tensor:
    """Return which summaries of keys some summaries of queries see, bool ``[count, Sk]``."""
    size_q, size_k = options.size
    ends = (options.past or 0) + size_q * torch.arange(first + 1, first + count + 1, device=keys.device)
    return size_k * torch.arange(keys.shape[2], device=keys.device) < ends[:, None]
