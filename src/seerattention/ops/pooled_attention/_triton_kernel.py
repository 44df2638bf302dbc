"""The device functions of the Triton backend; `triton.py` beside this file starts them."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.language import (
    add_product,
    cap,
    jit,
    load_tile,
    score,
    sequence_of,
    softmax_start,
    softmax_step,
    store_tile,
    tl,
)


@jit
def _keep(cells_ptr, cell, values, DIRECT: tl.constexpr, BLOCK_M: tl.constexpr, CELLS: tl.constexpr):
    """Store what each row has in one cell, ``[BLOCK_M]``, or in ``CELLS`` from it on, ``[BLOCK_M, CELLS]``.

    What a cell has of the tile's rows lies together. ``DIRECT`` stores from the threads that have the values,
    several the same one; Triton's own store first spreads them over all threads, through shared memory and a
    barrier.
    """
    rows = tl.arange(0, BLOCK_M)
    if CELLS == 1:
        ptrs = cells_ptr + cell * BLOCK_M + rows
    else:
        ptrs = cells_ptr + (cell + tl.arange(0, CELLS))[None, :] * BLOCK_M + rows[:, None]
    if DIRECT:
        tl.inline_asm_elementwise(
            "st.global.f32 [$1], $2; mov.b32 $0, 0;", "=r,l,f", [ptrs.to(tl.int64), values],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(ptrs, values)


@jit
def _step(
    q,
    acc,
    maximum,
    total,
    cells_ptr,
    k_desc,
    v_desc,
    k_ptr,
    v_ptr,
    stride_kt,
    stride_vt,
    b,
    kv_head,
    start_k,
    first_key,
    first_query,
    end_key,
    scale,
    softcap,
    MASKED: tl.constexpr,
    DIRECT: tl.constexpr,
    TMA: tl.constexpr,
    HAS_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CELL: tl.constexpr,
    MASS: tl.constexpr,
):
    """Add ``BLOCK_N`` keys from ``first_key`` on to the running softmax and keep what their cells have.

    ``scale`` makes logarithms to base 2 of scores, and maxima are kept as `softmax_step` keeps them; with
    MASS the cells' sums of exponentials are, as logarithms to base 2.
    ``first_query`` is the position of the tile's first query; no query sees ``end_key`` or a later key.
    """
    CELLS: tl.constexpr = BLOCK_N // CELL
    keys, rows, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    k_ptrs = k_ptr + tl.cast(first_key, tl.int64) * stride_kt + (keys[None, :] * stride_kt + dims[:, None])
    v_ptrs = v_ptr + tl.cast(first_key, tl.int64) * stride_vt + (keys[:, None] * stride_vt + dims[None, :])
    if MASKED:
        inside = keys < end_key - first_key
        k = tl.load(k_ptrs, mask=inside[None, :] & (dims < D)[:, None], other=0.0)
    elif TMA:
        k = tl.reshape(k_desc.load([b, kv_head, start_k + first_key, 0]), [BLOCK_N, BLOCK_D]).T
    elif BLOCK_D == D:
        k = tl.load(k_ptrs)
    else:
        k = tl.load(k_ptrs, mask=(dims < D)[:, None], other=0.0)
    exact: tl.constexpr = q.dtype == tl.float32
    scores = score(q, k, scale)
    if SOFTCAP:
        scores = cap(scores * scale, softcap, exact)
        scale = 1.4426950408889634
    if MASKED:
        later = (first_key + keys)[None, :] > (first_query + rows)[:, None]
        scores = tl.where(later | (keys >= end_key - first_key)[None, :], float("-inf"), scores)
    unit = 1.0 if exact else scale
    # A maximum of the cells' maxima would have another layout than the scores, and so would all after it.
    largest = tl.max(scores, 1) * unit
    cell = first_key // CELL
    if not MASS:
        by_cell = largest if CELLS == 1 else tl.max(tl.reshape(scores, [BLOCK_M, CELLS, CELL]), 2) * unit
        _keep(cells_ptr, cell, by_cell, DIRECT, BLOCK_M, CELLS)
    p, fade, maximum, total = softmax_step(scores, largest, maximum, total, scale, exact, MASKED)
    if MASS:
        # The logarithm of a row's sum is -inf where it sees nothing of a cell, as its maximum so far may be.
        base = maximum * scale if exact else maximum
        if CELLS == 1:
            by_cell = base + tl.log2(tl.sum(p, 1))
        else:
            by_cell = base[:, None] + tl.log2(tl.sum(tl.reshape(p, [BLOCK_M, CELLS, CELL]), 2))
        _keep(cells_ptr, cell, by_cell, DIRECT, BLOCK_M, CELLS)
    if HAS_V:
        if MASKED:
            v = tl.load(v_ptrs, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
        elif TMA:
            v = tl.reshape(v_desc.load([b, kv_head, start_k + first_key, 0]), [BLOCK_N, BLOCK_D])
        elif BLOCK_D == D:
            v = tl.load(v_ptrs)
        else:
            v = tl.load(v_ptrs, mask=(dims < D)[None, :], other=0.0)
        acc = add_product(acc * fade[:, None], p, v, scale)
    return acc, maximum, total


@jit
def _pool(
    cells_ptr,
    map_tile,
    maximum,
    total,
    scale,
    valid_rows,
    valid_queries,
    written,
    seen_columns,
    columns,
    again,
    RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MERGE: tl.constexpr,
    CHUNK: tl.constexpr,
    MASS: tl.constexpr,
):
    """Write the largest weight of every block of a tile to the map, or raise what the map holds to it.

    With MASS it is the largest of the queries' sums of weights. Returns the sums of the map's rows. ``again``
    says that the rows hold weights of another head or tile; ``written`` is how many cells this one has, which
    may be fewer than the rows see.
    """
    IN_ROW: tl.constexpr = min(BLOCK_Q, BLOCK_M)
    ROWS: tl.constexpr = BLOCK_M // IN_ROW
    places, map_rows = tl.arange(0, BLOCK_M), tl.arange(0, ROWS)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    # A query past the end, or one that sees nothing, has no weight anywhere.
    nothing = (total == 0) | (places >= valid_queries)
    share = tl.where(
        nothing, 0.0, tl.div_rn(tl.full(total.shape, 1.0, tl.float32), tl.where(nothing, 1.0, total))
    )
    sums = tl.zeros([ROWS], dtype=tl.float32)
    for first in tl.range(0, seen_columns, CHUNK, num_stages=1):
        cells = first * MERGE + tl.arange(0, CHUNK * MERGE)
        ptrs = cells_ptr + cells[:, None] * BLOCK_M + places[None, :]
        x = tl.load(ptrs, mask=(cells < written)[:, None], other=float("-inf"))
        power = x - finite[None, :] * scale if MASS else (x - finite[None, :]) * scale
        weights = tl.exp2(power) * share[None, :]
        if MERGE > 1:
            parts = tl.reshape(weights, [CHUNK, MERGE, BLOCK_M])
            weights = tl.sum(parts, 1) if MASS else tl.max(parts, 1)
        if IN_ROW > 1:
            weights = tl.max(tl.reshape(weights, [CHUNK, ROWS, IN_ROW]), 2)
        block = first + tl.arange(0, CHUNK)
        here = (block < seen_columns)[:, None] & (map_rows < valid_rows)[None, :]
        ptrs = map_tile + map_rows[None, :] * columns + block[:, None]
        if RAISE and again:
            weights = tl.maximum(weights, tl.load(ptrs, mask=here, other=0.0))
        tl.store(ptrs, weights, mask=here)
        sums += tl.sum(tl.where(here, weights, 0.0), 0)
    return sums


@jit
def _divide(map_tile, sums, valid_rows, seen_columns, columns, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Divide rows of the map by their sums."""
    map_rows = tl.arange(0, ROWS)
    sums = tl.where(sums == 0, 1.0, sums)
    for first in tl.range(0, seen_columns, CHUNK, num_stages=1):
        block = first + tl.arange(0, CHUNK)
        here = (map_rows < valid_rows)[:, None] & (block < seen_columns)[None, :]
        ptrs = map_tile + map_rows[:, None] * columns + block[None, :]
        weights = tl.load(ptrs, mask=here, other=0.0)
        # Rounded to nearest, so that a row of one block is exactly 1.
        tl.store(ptrs, tl.div_rn(weights, tl.broadcast_to(sums[:, None], weights.shape)), mask=here)


@jit("items", "rows", "map_rows", "columns", "cells", "num_queries", "num_keys", "sequences")
def pooled_kernel(  # noqa: PLR0915
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    out_ptr,
    map_ptr,
    lse_ptr,
    scratch_ptr,
    counter_ptr,
    sinks_ptr,
    starts_q_ptr,
    starts_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    items,
    rows,
    map_rows,
    columns,
    cells,
    num_queries,
    num_keys,
    sequences,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PER_KV_HEAD: tl.constexpr,
    MASS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    DIRECT: tl.constexpr,
    TMA: tl.constexpr,
    HAS_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take rows of the map from the counter until there are none left; `triton.py` says what an item is."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    # A query block longer than a tile is several tiles, which one program takes one after another.
    TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    PASSES: tl.constexpr = TILES * GROUP if PER_KV_HEAD else TILES
    IN_ITEM: tl.constexpr = 1 if PER_KV_HEAD else GROUP
    MAP_HEADS: tl.constexpr = KV_HEADS if PER_KV_HEAD else HEADS
    MAP_ROWS: tl.constexpr = BLOCK_M // min(BLOCK_Q, BLOCK_M)
    CELL: tl.constexpr = min(BLOCK_K, BLOCK_N)
    MERGE: tl.constexpr = BLOCK_K // CELL
    places = tl.arange(0, BLOCK_M)
    cells_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * cells * BLOCK_M
    item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < items:
        # One KV head after another keeps its keys in the cache; its late rows, which read most, come first.
        row = item // IN_ITEM
        b, kv_head = row // rows // KV_HEADS, row // rows % KV_HEADS
        first_head = kv_head * GROUP + item % IN_ITEM
        row = rows - 1 - row % rows
        next_item = tl.atomic_add(counter_ptr, 1, sem="relaxed")

        row, map_start, start_q, len_q, start_k, len_k = sequence_of(
            row, starts_q_ptr, (starts_q_ptr, starts_k_ptr, sequences), num_queries, num_keys,
            TILES * BLOCK_M, BLOCK_Q, SEQUENCES,
        )  # fmt: skip
        map_head = kv_head if PER_KV_HEAD else first_head
        map_row = map_start + row * MAP_ROWS
        map_tile = map_ptr + ((b * MAP_HEADS + map_head).to(tl.int64) * map_rows + map_row) * columns
        item_end = tl.minimum((row + 1) * TILES * BLOCK_M, len_q)
        valid_rows = (item_end - row * TILES * BLOCK_M + BLOCK_Q - 1) // BLOCK_Q
        seen = (len_k - len_q + item_end + BLOCK_K - 1) // BLOCK_K
        seen_columns = tl.where(row * TILES * BLOCK_M < item_end, seen, 0)
        # Products with strides may need 64 bits.
        b64, group64, first_k = b.to(tl.int64), kv_head.to(tl.int64), tl.cast(start_k, tl.int64)
        k_head = k_ptr + b64 * k_strides[0] + group64 * k_strides[1] + first_k * k_strides[2]
        v_head = v_ptr + b64 * v_strides[0] + group64 * v_strides[1] + first_k * v_strides[2]
        log2_scale = scale if SOFTCAP else scale * 1.4426950408889634
        natural_scale = 1.0 if SOFTCAP else scale
        sums = tl.zeros([MAP_ROWS], dtype=tl.float32)

        for turn in tl.range(0, PASSES, num_stages=1):
            head = first_head + turn // TILES
            first = row * TILES * BLOCK_M + turn % TILES * BLOCK_M
            end = tl.minimum(first + BLOCK_M, len_q)
            q_head = q_ptr + b64 * q_strides[0] + head.to(tl.int64) * q_strides[1]
            q = load_tile(q_head, q_strides[2], start_q + first, end - first, BLOCK_M, D, BLOCK_D)
            # What one unit of `maximum` is in natural logarithms, and in logarithms to base 2.
            unit = natural_scale if q.dtype == tl.float32 else 0.6931471805599453
            unit2 = unit * 1.4426950408889634 if q.dtype == tl.float32 else 1.0
            acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            maximum, total = softmax_start(sinks_ptr, head, unit, BLOCK_M, SINKS)
            first_query = len_k - len_q + first
            end_key = tl.where(first < end, len_k - len_q + end, 0)
            # Keys that every query of the tile sees need no mask.
            open_keys = tl.minimum(end_key, tl.maximum(first_query + 1, 0)) // BLOCK_N * BLOCK_N
            for first_key in tl.range(0, open_keys, BLOCK_N, num_stages=STAGES):
                acc, maximum, total = _step(
                    q, acc, maximum, total, cells_ptr, k_desc, v_desc, k_head, v_head, k_strides[2],
                    v_strides[2], b, kv_head, start_k, first_key, first_query, end_key, log2_scale, softcap,
                    False, DIRECT, TMA, HAS_V, SOFTCAP, D, BLOCK_D, BLOCK_M, BLOCK_N, CELL, MASS,
                )  # fmt: skip
            for first_key in tl.range(open_keys, end_key, BLOCK_N, num_stages=1):
                acc, maximum, total = _step(
                    q, acc, maximum, total, cells_ptr, k_desc, v_desc, k_head, v_head, k_strides[2],
                    v_strides[2], b, kv_head, start_k, first_key, first_query, end_key, log2_scale, softcap,
                    True, DIRECT, TMA, HAS_V, SOFTCAP, D, BLOCK_D, BLOCK_M, BLOCK_N, CELL, MASS,
                )  # fmt: skip

            if HAS_V:
                # A query that sees nothing gets zeros.
                acc = acc / tl.where(total == 0, 1.0, total)[:, None]
                out_head = out_ptr + b64 * out_strides[0] + head.to(tl.int64) * out_strides[1]
                store_tile(out_head, out_strides[2], start_q + first, end - first, acc, D)
            if LSE:
                lse_tile = lse_ptr + (b * HEADS + head).to(tl.int64) * num_queries + start_q + first
                natural = maximum * unit + tl.log2(total) * 0.6931471805599453
                tl.store(lse_tile + places, natural, mask=places < end - first)

            # Cells written by other threads, and map rows of the pass before, must be visible.
            tl.debug_barrier()
            written = (end_key + CELL - 1) // CELL
            sums = _pool(
                cells_ptr, map_tile, maximum, total, unit2, valid_rows, end - first, written,
                seen_columns, columns, turn > 0, PASSES > 1, BLOCK_M, BLOCK_Q, MERGE, CHUNK, MASS,
            )  # fmt: skip
            # Nobody may still read the cells when the next tile writes its own.
            tl.debug_barrier()

        _divide(map_tile, sums, valid_rows, seen_columns, columns, MAP_ROWS, CHUNK)
        item = next_item
