"""The specification: products, their maxima over sub-block pairs, in slices of rows of bounded size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seerattention.rows import num_blocks

#: Products are reduced to block scores in slices of at most this many bytes.
SLICE_BYTES = 16 * 2**20


def unsupported(**_: object) -> list[str]:
    """Return the reasons why this backend cannot run; it runs everything."""
    return []


def run(
    queries: Tensor, keys: Tensor, sub_blocks: tuple[int, int], scale: float, past_blocks: int | None
) -> Tensor:
    """Return the scores. A slice's products are computed again in the backward pass."""
    subs_q, subs_k = sub_blocks
    rows, columns = num_blocks(queries.shape[2], subs_q), num_blocks(keys.shape[2], subs_k)
    dtype = torch.promote_types(queries.dtype, torch.float32)
    # Once, before slices: theirs is then one sum in fp32, and scaling the queries is cheaper than the scores.
    queries, keys = queries.to(dtype) * scale, keys.to(dtype)
    row_bytes = dtype.itemsize * queries.shape[0] * queries.shape[1] * subs_q * keys.shape[2]
    step = max(1, SLICE_BYTES // row_bytes)
    learns = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    parts = []
    for start in range(0, rows, step):
        past = None if past_blocks is None else past_blocks + start
        seen = columns if past is None else min(columns, past + min(step, rows - start))
        args = (
            queries[:, :, start * subs_q : (start + step) * subs_q],
            keys[:, :, : seen * subs_k],
            sub_blocks, past, columns,
        )  # fmt: skip
        parts.append(
            checkpoint(_slice, *args, use_reentrant=False, preserve_rng_state=False)
            if learns
            else _slice(*args)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _slice(
    queries: Tensor,
    keys: Tensor,
    sub_blocks: tuple[int, int],
    past: int | None,
    columns: int,
) -> Tensor:
    """Score some rows against the blocks that they see; the columns after these are 0."""
    # A head's query summaries meet the key summaries of its group.
    heads, length = queries.shape[1:3]
    queries = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    with torch.autocast(queries.device.type, enabled=False):
        products = (queries @ keys.mT).unflatten(2, (heads // keys.shape[1], length))
    scores = max_over_sub_blocks(products, *sub_blocks).flatten(1, 2)
    if past is None:
        return scores
    row = torch.arange(past, past + scores.shape[2], device=scores.device)[:, None]
    later = torch.arange(scores.shape[3], device=scores.device) > row
    return nn.functional.pad(scores.masked_fill(later, 0), (0, columns - scores.shape[3]))


def max_over_sub_blocks(products: Tensor, subs_q: int, subs_k: int) -> Tensor:
    """Reduce ``[..., Nq * subs_q, Nk * subs_k]`` (the last block possibly short) to ``[..., Nq, Nk]``."""
    learns = products.requires_grad
    # Rows first is faster, as their elements lie side by side; columns first gives a gradient to the first of
    # equal pairs in memory order.
    for dim, subs in ((-1, subs_k), (-2, subs_q)) if learns else ((-2, subs_q), (-1, subs_k)):
        if subs == 1:
            continue
        missing = -products.shape[dim] % subs
        if missing:
            pad = (0, missing) if dim == -1 else (0, 0, 0, missing)
            products = nn.functional.pad(products, pad, value=float("-inf"))
        products = products.unflatten(dim, (-1, subs))
        # amax, faster, would share a gradient among equals; max gives it to the first of them.
        products = products.max(dim).values if learns else products.amax(dim)
    return products
