"""Kernels that turn products of query summaries with blocks into the largest shares, and send gradients back.

A program has the summaries of one query block, as rows of a tile. What it reads is small: a summary's largest
product in each block (`_triton_kernel.score`).
"""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.language import jit, tl


@jit
def seen_products(products, sub, column, ends, columns, mine, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """Return a tile of products, -inf where a summary does not see a block, and which are seen."""
    seen = mine[:, None] & (column < columns)[None, :]
    if CAUSAL:
        seen &= column[None, :] * BLOCK_K < ends[:, None]
    at = sub.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(products + at, mask=seen, other=float("-inf")), seen


@jit("subs", "rows", "columns", "past")
def share(
    products,
    scores,
    winners,
    sums,
    subs,
    rows,
    columns,
    past,
    SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Write a row of scores and, with KEEP, the summary of each and all summaries' logarithms of sums."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    products += head * subs * columns
    place = tl.arange(0, SUBS_PAD)
    sub = row * SUBS + place
    mine = (place < SUBS) & (sub < subs)
    ends = past + (sub + 1) * SIZE
    last = tl.max(tl.where(mine, ends, 0))
    end = tl.minimum(columns, tl.cdiv(last, BLOCK_K)) if CAUSAL else columns
    largest = tl.full([SUBS_PAD], float("-inf"), tl.float32)
    total = tl.zeros([SUBS_PAD], tl.float32)
    for start in range(0, end, CHUNK):
        column = start + tl.arange(0, CHUNK)
        part, _ = seen_products(products, sub, column, ends, columns, mine, BLOCK_K, CAUSAL)
        most = tl.maximum(largest, tl.max(part, 1))
        # Of rows that are none.
        safe = tl.where(mine, most, 0.0)
        total = total * tl.exp(largest - safe) + tl.sum(tl.exp(part - safe[:, None]), 1)
        largest = most
    level = tl.where(mine, largest + tl.log(tl.where(mine, total, 1.0)), 0.0)
    if KEEP:
        tl.store(sums + head * subs + sub, level, mask=mine)
    for start in range(0, end, CHUNK):
        column = start + tl.arange(0, CHUNK)
        part, _ = seen_products(products, sub, column, ends, columns, mine, BLOCK_K, CAUSAL)
        best, winner = tl.max(part - level[:, None], 0, return_indices=True)
        given = column < end
        at = (head * rows + row) * columns + column
        tl.store(scores + at, best, mask=given)
        if KEEP:
            tl.store(winners + at, winner.to(winners.dtype.element_ty), mask=given)


@jit("subs", "rows", "columns", "past")
def unshare(
    products,
    gradient,
    winners,
    sums,
    subs,
    rows,
    columns,
    past,
    SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write products' gradients over the products that are seen."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    products += head * subs * columns
    place = tl.arange(0, SUBS_PAD)
    sub = row * SUBS + place
    mine = (place < SUBS) & (sub < subs)
    ends = past + (sub + 1) * SIZE
    last = tl.max(tl.where(mine, ends, 0))
    end = tl.minimum(columns, tl.cdiv(last, BLOCK_K)) if CAUSAL else columns
    at_row = (head * rows + row) * columns
    level = tl.load(sums + head * subs + sub, mask=mine, other=0.0)
    # What a summary's shares pass on in all, taken from each in proportion.
    total = tl.zeros([SUBS_PAD], tl.float32)
    for start in range(0, end, CHUNK):
        column = start + tl.arange(0, CHUNK)
        given = column < end
        weight = tl.load(gradient + at_row + column, mask=given, other=0.0)
        winner = tl.load(winners + at_row + column, mask=given, other=0).to(tl.int32)
        total += tl.sum(tl.where(winner[None, :] == place[:, None], weight[None, :], 0.0), 1)
    for start in range(0, end, CHUNK):
        column = start + tl.arange(0, CHUNK)
        given = column < end
        weight = tl.load(gradient + at_row + column, mask=given, other=0.0)
        winner = tl.load(winners + at_row + column, mask=given, other=0).to(tl.int32)
        part, seen = seen_products(products, sub, column, ends, columns, mine, BLOCK_K, CAUSAL)
        own = tl.where(winner[None, :] == place[:, None], weight[None, :], 0.0)
        at = sub.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(products + at, own - tl.exp(part - level[:, None]) * total[:, None], mask=seen)
