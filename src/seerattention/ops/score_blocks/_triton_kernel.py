"""Kernels of `score_blocks`: one that scores and remembers which pair won, one that sends gradients back.

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
    EXACT: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of block scores and, if wanted, the number of the pair that each came from.

    With EXACT, of the block that a row ends in only those summaries of keys count that begin by its end.
    """
    across = tl.cdiv(columns, BLOCK_N)
    # The last rows see the most blocks: first.
    down = tl.cdiv(rows, BLOCK_M) - 1 - tl.program_id(1) // across
    row = down * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(1) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    latest = past + (down + 1) * BLOCK_M * BLOCK_Q - 1
    seen = tl.minimum(columns, latest // BLOCK_K + 1) if CAUSAL else columns
    if (tl.program_id(1) % across) * BLOCK_N < seen:
        head = tl.program_id(0).to(tl.int64)
        last_query = past + row * BLOCK_Q + (BLOCK_Q - 1)
        best, winner = best_products(
            queries + head * query_subs * E, keys + (head // GROUP) * key_subs * E, row, column,
            query_subs - 1, key_subs - 1, E, E_PAD, SUBS_Q, SUBS_K, RESIDENT, PRECISION, KEEP,
            last_query, BLOCK_K // SUBS_K if EXACT else 0,
        )  # fmt: skip
        best *= scale
        if CAUSAL:
            best = tl.where(column[None, :] * BLOCK_K <= last_query[:, None], best, 0.0)
        at = head * rows * columns + row[:, None] * columns + column[None, :]
        kept = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(scores + at, best, mask=kept)
        if KEEP:
            tl.store(winners + at, winner.to(winners.dtype.element_ty), mask=kept)


@jit("query_subs", "key_subs", "rows", "columns", "past")
def back(
    gradient,
    winners,
    other,
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
    TO_KEYS: tl.constexpr,
):
    """Write the gradient of one sub-block of a tile of blocks: the other side's summaries that won, weighted.

    The tile is of `BLOCK_M` query blocks, or with TO_KEYS of `BLOCK_N` KV blocks, from all heads of a group.
    """
    MINE: tl.constexpr = BLOCK_N if TO_KEYS else BLOCK_M
    SUBS: tl.constexpr = SUBS_K if TO_KEYS else SUBS_Q
    OTHER_SUBS: tl.constexpr = SUBS_Q if TO_KEYS else SUBS_K
    tile, sub = tl.program_id(1) // SUBS, tl.program_id(1) % SUBS
    if TO_KEYS:
        # The first blocks are seen by the most rows: they come first by themselves.
        before = tl.maximum(tile * BLOCK_N * BLOCK_K - past, 0) if CAUSAL else 0
        first = before // (BLOCK_Q * BLOCK_M) * BLOCK_M
        end, subs, other_subs = rows, key_subs, query_subs
    else:
        # The last rows see the most blocks: first.
        tile = tl.cdiv(rows, BLOCK_M) - 1 - tile
        latest = past + (tile + 1) * BLOCK_M * BLOCK_Q - 1
        first, end = 0, tl.minimum(columns, latest // BLOCK_K + 1) if CAUSAL else columns
        subs, other_subs = query_subs, key_subs
    mine = tile * MINE + tl.arange(0, MINE)
    e = tl.arange(0, E_PAD)
    out_head = tl.program_id(0).to(tl.int64)
    total = tl.zeros([MINE, E_PAD], tl.float32)
    for member in range(GROUP if TO_KEYS else 1):
        head = out_head * GROUP + member if TO_KEYS else out_head
        others = other + (head if TO_KEYS else head // GROUP) * other_subs * E + e[None, :]
        at_head = head * rows * columns
        # In fp32 a sum per head and then their sum: shorter chains round less.
        sum_of_head = total * 0.0 if other.dtype.element_ty == tl.float32 else total
        for start in range(first, end, BLOCK_M if TO_KEYS else BLOCK_N):
            their = start + tl.arange(0, BLOCK_M if TO_KEYS else BLOCK_N)
            row = their[None, :] if TO_KEYS else mine[:, None]
            column = mine[:, None] if TO_KEYS else their[None, :]
            given = (row < rows) & (column < columns)
            if CAUSAL:
                # How far a row's first query may be before the KV block, for the row to see it.
                given &= column * BLOCK_K - (past + BLOCK_Q - 1) <= row * BLOCK_Q
            place = row * columns + column
            weight = tl.load(gradient + at_head + place, mask=given, other=0.0)
            pair = tl.load(winners + at_head + place, mask=given, other=0).to(tl.int32)
            if unit is not None:
                weight /= tl.load(unit)
            pair -= sub if TO_KEYS else sub * SUBS_K
            for other_sub in range(OTHER_SUBS):
                at = others + tl.minimum(their * OTHER_SUBS + other_sub, other_subs - 1)[:, None] * E
                summary = tl.load(at, mask=(e < E)[None, :], other=0.0)
                part = tl.where(pair == (other_sub * SUBS_K if TO_KEYS else other_sub), weight, 0.0)
                # A gradient may be a sum of few terms: three tf32 products would be seen.
                sum_of_head = add_product(sum_of_head, part, summary, scale)
        total = total + sum_of_head if other.dtype.element_ty == tl.float32 else sum_of_head
    total *= scale
    if unit is not None:
        total *= tl.load(unit)
    sub += mine * SUBS
    to = out + out_head * subs * E + sub[:, None] * E + e[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(sub < subs)[:, None] & (e < E)[None, :])
