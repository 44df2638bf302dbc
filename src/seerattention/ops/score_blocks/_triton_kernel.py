"""Kernels of `score_blocks`: one that scores and remembers which pair won, two that send gradients back.

In all of them sub-block ``i`` of many query blocks meets sub-block ``j`` of many KV blocks in one product,
so that whatever belongs to a block pair lies in the same place of every tile: maxima, and the choice of
the winning pair, are taken register by register.
"""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.language import add_product, best_products, jit, tl


@jit("query_subs", "key_subs", "rows", "columns", "past")
def score(
    queries,
    keys,
    scores,
    winners,
    query_subs,
    key_subs,
    rows,
    columns,
    past,
    scale,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SUBS_Q: tl.constexpr,
    SUBS_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of block scores and, if wanted, the number of the pair that each came from."""
    across = tl.cdiv(columns, BLOCK_N)
    # The last rows see the most blocks: first.
    down = tl.cdiv(rows, BLOCK_M) - 1 - tl.program_id(1) // across
    row = down * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(1) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = (
        tl.minimum(columns, (past + (down + 1) * BLOCK_M * BLOCK_Q - 1) // BLOCK_K + 1) if CAUSAL else columns
    )
    if (tl.program_id(1) % across) * BLOCK_N < seen:
        head = tl.program_id(0).to(tl.int64)
        best, winner = best_products(
            queries + head * query_subs * E, keys + (head // GROUP) * key_subs * E, row, column,
            query_subs - 1, key_subs - 1, E, E_PAD, 0, SUBS_Q, SUBS_K, RESIDENT, PRECISION, KEEP,
        )  # fmt: skip
        best *= scale
        if CAUSAL:
            last_query = past + row * BLOCK_Q + (BLOCK_Q - 1)
            best = tl.where(column[None, :] * BLOCK_K <= last_query[:, None], best, 0.0)
        at = head * rows * columns + row[:, None] * columns + column[None, :]
        kept = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(scores + at, best, mask=kept)
        if KEEP:
            tl.store(winners + at, winner.to(winners.dtype.element_ty), mask=kept)


@jit("query_subs", "key_subs", "rows", "columns", "past")
def back_to_queries(
    gradient,
    winners,
    keys,
    unit,
    out,
    query_subs,
    key_subs,
    rows,
    columns,
    past,
    scale,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SUBS_Q: tl.constexpr,
    SUBS_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the gradient of one sub-block of `BLOCK_M` query blocks: their winning keys, weighted."""
    head = tl.program_id(0).to(tl.int64)
    down = tl.cdiv(rows, BLOCK_M) - 1 - tl.program_id(1) // SUBS_Q
    sub_q = tl.program_id(1) % SUBS_Q
    row = down * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, E_PAD)
    keys += (head // GROUP) * key_subs * E + e[None, :]
    gradient += head * rows * columns
    winners += head * rows * columns
    end = (
        tl.minimum(columns, (past + (down + 1) * BLOCK_M * BLOCK_Q - 1) // BLOCK_K + 1) if CAUSAL else columns
    )
    last = (past + row * BLOCK_Q + (BLOCK_Q - 1)) // BLOCK_K
    total = tl.zeros([BLOCK_M, E_PAD], tl.float32)
    for start in range(0, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        given = (row < rows)[:, None] & (column < columns)[None, :]
        if CAUSAL:
            given &= column[None, :] <= last[:, None]
        weight, pair = _weights(gradient, winners, row[:, None] * columns + column[None, :], given, unit)
        pair -= sub_q * SUBS_K
        for sub_k in range(SUBS_K):
            at = keys + tl.minimum(column * SUBS_K + sub_k, key_subs - 1)[:, None] * E
            key = tl.load(at, mask=(e < E)[None, :], other=0.0)
            # A gradient may be a sum of few terms: three tf32 products would be seen.
            total = add_product(total, tl.where(pair == sub_k, weight, 0.0), key, scale)
    _store(out + head * query_subs * E, total, row * SUBS_Q + sub_q, query_subs, unit, scale, E)


@jit("query_subs", "key_subs", "rows", "columns", "past")
def back_to_keys(
    gradient,
    winners,
    queries,
    unit,
    out,
    query_subs,
    key_subs,
    rows,
    columns,
    past,
    scale,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SUBS_Q: tl.constexpr,
    SUBS_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the gradient of one sub-block of `BLOCK_N` KV blocks, from all heads of its group."""
    head_k = tl.program_id(0).to(tl.int64)
    # The first blocks are seen by the most rows: they come first by themselves.
    tile, sub_k = tl.program_id(1) // SUBS_K, tl.program_id(1) % SUBS_K
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, E_PAD)
    first = tl.maximum(tile * BLOCK_N * BLOCK_K - past, 0) // (BLOCK_Q * BLOCK_M) * BLOCK_M if CAUSAL else 0
    # How far a row's first query may be before the KV block, for the row to see it.
    before = column * BLOCK_K - (past + BLOCK_Q - 1)
    total = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    for member in range(GROUP):
        head = head_k * GROUP + member
        first_q = queries + head * query_subs * E + e[None, :]
        at_head = head * rows * columns
        # In fp32 a sum per head and then their sum: shorter chains round less.
        sum_of_head = total * 0.0 if queries.dtype.element_ty == tl.float32 else total
        for start in range(first, rows, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            given = (row < rows)[None, :] & (column < columns)[:, None]
            if CAUSAL:
                given &= before[:, None] <= (row * BLOCK_Q)[None, :]
            place = row[None, :] * columns + column[:, None]
            weight, pair = _weights(gradient + at_head, winners + at_head, place, given, unit)
            pair -= sub_k
            for sub_q in range(SUBS_Q):
                at = first_q + tl.minimum(row * SUBS_Q + sub_q, query_subs - 1)[:, None] * E
                query = tl.load(at, mask=(e < E)[None, :], other=0.0)
                part = tl.where(pair == sub_q * SUBS_K, weight, 0.0)
                sum_of_head = add_product(sum_of_head, part, query, scale)
        total = total + sum_of_head if queries.dtype.element_ty == tl.float32 else sum_of_head
    _store(out + head_k * key_subs * E, total, column * SUBS_K + sub_k, key_subs, unit, scale, E)


@jit
def _weights(gradient, winners, at, given, unit):
    """Load the gradients, as shares of ``unit``, and winning pairs of a tile; 0 where they are not given."""
    weight = tl.load(gradient + at, mask=given, other=0.0)
    pair = tl.load(winners + at, mask=given, other=0).to(tl.int32)
    if unit is not None:
        weight /= tl.load(unit)
    return weight, pair


@jit
def _store(out, total, sub, subs, unit, scale, E: tl.constexpr):
    """Write the gradients of the sub-blocks that there are."""
    e = tl.arange(0, total.shape[1])
    total *= scale
    if unit is not None:
        total *= tl.load(unit)
    kept = (sub < subs)[:, None] & (e < E)[None, :]
    tl.store(out + sub[:, None] * E + e[None, :], total.to(out.dtype.element_ty), mask=kept)
