"""The forward's device functions, and what the backward's row by row share with it."""

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

#: Numbers that change from call to call.
LENGTHS = (
    *("stride_bits_b", "stride_bits_h", "stride_bits_row", "items", "rows", "columns"),
    *("num_queries", "num_keys", "sequences"),
)


@jit
def expand(bits_ptr, list_ptr, last_block, WORDS: tl.constexpr):
    """Write the numbers of the set bits up to ``last_block``, ascending, and return how many there are."""
    places = tl.arange(0, 32)
    count = 0
    # Nobody may still read the list of the tile before.
    tl.debug_barrier()
    for start in range(0, last_block // 32 + 1, WORDS):
        words = start + tl.arange(0, WORDS)
        word = tl.load(bits_ptr + words, mask=words <= last_block // 32, other=0)
        blocks = words[:, None] * 32 + places[None, :]
        chosen = ((word[:, None] >> places[None, :]) & 1) & (blocks <= last_block).to(tl.int32)
        in_word = tl.sum(chosen, 1)
        before = count + tl.cumsum(in_word, 0) - in_word
        rank = before[:, None] + tl.cumsum(chosen, 1) - 1
        tl.store(list_ptr + rank, blocks, mask=chosen != 0)
        count += tl.sum(in_word, 0)
    tl.debug_barrier()
    return count


@jit
def open_row(
    item, rows, columns, bits_ptr, bit_strides, starts, num_queries, num_keys,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BIT_HEADS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Find the tile of queries of an item: a piece of a row of the selection, of one head.

    One KV head after another keeps its keys in the cache; its late rows, which read most, come first.

    Returns the batch entry, KV head and query head; the row's bits and the last block that its queries see,
    -1 for none; the tile's first token, its queries and their first one's position; and the sequence's first
    key and number of keys.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    tile = item % TILES
    in_group = item // TILES % GROUP
    row = item // (TILES * GROUP)
    kv_head, b = row // rows % KV_HEADS, row // rows // KV_HEADS
    head = kv_head * GROUP + in_group
    row = rows - 1 - row % rows
    # Products with strides may need 64 bits.
    bits_ptr += b.to(tl.int64) * bit_strides[0] + (head // (HEADS // BIT_HEADS)).to(tl.int64) * bit_strides[1]
    bits_ptr += row.to(tl.int64) * bit_strides[2]
    row, _, start_q, len_q, start_k, len_k = sequence_of(
        row, starts[0], starts, num_queries, num_keys, BLOCK_Q, BLOCK_Q, SEQUENCES
    )
    first = row * BLOCK_Q + tile * BLOCK_M
    queries = tl.minimum(tl.minimum(first + BLOCK_M, (row + 1) * BLOCK_Q), len_q) - first
    first_query = len_k - len_q + first
    last_query = first_query + queries - 1
    last_block = tl.minimum(tl.where(last_query < 0, -1, last_query // BLOCK_K), columns - 1)
    last_block = tl.where(queries > 0, last_block, -1)
    return b, kv_head, head, bits_ptr, last_block, start_q + first, queries, first_query, start_k, len_k


@jit(*LENGTHS)
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    bits_ptr,
    scratch_ptr,
    counter_ptr,
    sinks_ptr,
    starts_q_ptr,
    starts_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    stride_bits_b,
    stride_bits_h,
    stride_bits_row,
    items,
    rows,
    columns,
    num_queries,
    num_keys,
    sequences,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BIT_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take query tiles from the counter until there are none left."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    places, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    list_ptr = scratch_ptr + tl.program_id(0) * (columns + 1)
    item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < items:
        b, kv_head, head, bits_row, last_block, token, queries, first_query, start_k, len_k = open_row(
            item, rows, columns, bits_ptr, (stride_bits_b, stride_bits_h, stride_bits_row),
            (starts_q_ptr, starts_k_ptr, sequences), num_queries, num_keys,
            HEADS, KV_HEADS, BIT_HEADS, BLOCK_Q, BLOCK_K, BLOCK_M, SEQUENCES,
        )  # fmt: skip
        b, kv_head, head = b.to(tl.int64), kv_head.to(tl.int64), head.to(tl.int64)
        q_head = q_ptr + b * q_strides[0] + head * q_strides[1]
        q = load_tile(q_head, q_strides[2], token, queries, BLOCK_M, D, BLOCK_D)
        # Asked for early, so that the answer travels together with the queries.
        next_item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
        count = expand(bits_row, list_ptr, last_block, 32)

        first_k = tl.cast(start_k, tl.int64)
        k_head = k_ptr + b * k_strides[0] + kv_head * k_strides[1] + first_k * k_strides[2]
        v_head = v_ptr + b * v_strides[0] + kv_head * v_strides[1] + first_k * v_strides[2]
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        # Scores times the first are capped, or times the second logarithms to base 2, as capped ones are.
        log2_scale = scale if SOFTCAP else scale * 1.4426950408889634
        base2 = 1.4426950408889634 if SOFTCAP else log2_scale
        # What one unit of `maximum` is in natural logarithms.
        natural_scale = 1.0 if SOFTCAP else scale
        unit = natural_scale if EXACT else 0.6931471805599453
        maximum, total = softmax_start(sinks_ptr, head, unit, BLOCK_M, SINKS)

        # The list is read one step ahead, so that the loads of keys and values never wait for it.
        block = tl.load(list_ptr)
        for i in tl.range(0, count * STEPS, num_stages=STAGES):
            first_key = block * BLOCK_K + i % STEPS * BLOCK_N
            block = tl.load(list_ptr + (i + 1) // STEPS)
            k_ptrs = k_head + first_key.to(tl.int64) * k_strides[2]
            k_ptrs += keys[None, :] * k_strides[2] + dims[:, None]
            here = (keys < len_k - first_key)[None, :] & (dims < D)[:, None]
            k = tl.load(k_ptrs, mask=here, other=0.0)
            v = load_tile(v_head, v_strides[2], first_key, len_k - first_key, BLOCK_N, D, BLOCK_D)
            scores = score(q, k, log2_scale)
            if SOFTCAP:
                scores = cap(scores * log2_scale, softcap, EXACT)
            # Only a row's own blocks hold keys after a query of the tile.
            if first_key + BLOCK_N > first_query + 1:
                later = (first_key + keys)[None, :] > (first_query + places)[:, None]
                scores = tl.where(later, float("-inf"), scores)
            largest = tl.max(scores, 1) * (1.0 if EXACT else base2)
            p, fade, maximum, total = softmax_step(scores, largest, maximum, total, base2, EXACT, True)
            acc = add_product(acc * fade[:, None], p, v, log2_scale)

        # A query that sees nothing gets zeros.
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        out_head = out_ptr + b * out_strides[0] + head * out_strides[1]
        store_tile(out_head, out_strides[2], token, queries, acc, D)
        if LSE:
            natural = maximum * unit + tl.log2(total) * 0.6931471805599453
            tl.store(
                lse_ptr + (b * HEADS + head) * num_queries + token + places, natural, mask=places < queries
            )
        item = next_item
