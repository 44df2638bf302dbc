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
    """Write a row of scores and, with KEEP, the summary of each and what makes shares of its products."""
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
    largest, level = tl.where(mine, largest, 0.0), tl.log(tl.where(mine, total, 1.0))
    if KEEP:
        # Both, as their sum would round away what small shares are made of.
        tl.store(sums + 2 * (head * subs + sub), largest, mask=mine)
        tl.store(sums + 2 * (head * subs + sub) + 1, level, mask=mine)
    for start in range(0, end, CHUNK):
        column = start + tl.arange(0, CHUNK)
        part, _ = seen_products(products, sub, column, ends, columns, mine, BLOCK_K, CAUSAL)
        best, winner = tl.max(part - largest[:, None] - level[:, None], 0, return_indices=True)
        given = column < end
        at = (head * rows + row) * columns + column
        tl.store(scores + at, best, mask=given)
        if KEEP:
            tl.store(winners + at, winner.to(winners.dtype.element_ty), mask=given)


@jit("subs", "rows", "columns", "key_subs", "past")
def unshare(
    products,
    pairs,
    gradient,
    winners,
    sums,
    unit,
    out,
    subs,
    rows,
    columns,
    past,
    key_subs,
    SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr,
    SUBS_K: tl.constexpr,
    SUBS_K_PAD: tl.constexpr,
):
    """Write gradients of the products of all summaries where they are seen, those that lost in a block 0."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    products += head * subs * columns
    pairs += head * subs * columns
    out += head * subs * key_subs
    place = tl.arange(0, SUBS_PAD)
    sub = row * SUBS + place
    mine = (place < SUBS) & (sub < subs)
    ends = past + (sub + 1) * SIZE
    last = tl.max(tl.where(mine, ends, 0))
    end = tl.minimum(columns, tl.cdiv(last, BLOCK_K)) if CAUSAL else columns
    at_row = (head * rows + row) * columns
    largest = tl.load(sums + 2 * (head * subs + sub), mask=mine, other=0.0)
    level = tl.load(sums + 2 * (head * subs + sub) + 1, mask=mine, other=0.0)
    factor = 1.0
    if unit is not None:
        factor = 1 / tl.load(unit)
    # What a summary's shares pass on in all, taken from each in proportion.
    total = tl.zeros([SUBS_PAD], tl.float32)
    for start in range(0, end, CHUNK):
        column = start + tl.arange(0, CHUNK)
        given = column < end
        weight = tl.load(gradient + at_row + column, mask=given, other=0.0)
        winner = tl.load(winners + at_row + column, mask=given, other=0).to(tl.int32)
        total += tl.sum(tl.where(winner[None, :] == place[:, None], weight[None, :], 0.0), 1)
    which = tl.arange(0, SUBS_K_PAD)
    for start in range(0, end, CHUNK):
        column = start + tl.arange(0, CHUNK)
        given = column < end
        weight = tl.load(gradient + at_row + column, mask=given, other=0.0)
        winner = tl.load(winners + at_row + column, mask=given, other=0).to(tl.int32)
        part, seen = seen_products(products, sub, column, ends, columns, mine, BLOCK_K, CAUSAL)
        own = tl.where(winner[None, :] == place[:, None], weight[None, :], 0.0)
        found = own - tl.exp(part - largest[:, None] - level[:, None]) * total[:, None]
        found *= factor
        cell = sub.to(tl.int64)[:, None] * columns + column[None, :]
        pair = tl.load(pairs + cell, mask=seen, other=0).to(tl.int32)
        spread = tl.where(pair[:, :, None] == which[None, None, :], found[:, :, None], 0.0)
        key = column[:, None] * SUBS_K + which[None, :]
        kept = seen[:, :, None] & ((which < SUBS_K)[None, :] & (key < key_subs))[None, :, :]
        at = sub.to(tl.int64)[:, None, None] * key_subs + key[None, :, :]
        tl.store(out + at, spread.to(out.dtype.element_ty), mask=kept)
