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
def first_words(bits_ptr, last_word, WORDS: tl.constexpr):
    """Load the first words of a row of bits, zeros past the last one."""
    words = tl.arange(0, WORDS)
    return tl.load(bits_ptr + words, mask=words <= last_word, other=0)


@jit
def ones(word):
    """Count the set bits of words of 32; compilers know the formula for what it is."""
    x = word.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@jit
def expand(bits_ptr, word, list_ptr, last_block, WORDS: tl.constexpr):
    """Write the numbers of the set bits up to ``last_block``, ascending, and return how many there are.

    ``word`` are the row's `first_words`.
    """
    place = tl.arange(0, 32)[None, :]
    count = 0
    # Nobody may still read the list of the tile before.
    tl.debug_barrier()
    for start in range(0, last_block // 32 + 1, WORDS):
        words = start + tl.arange(0, WORDS)
        # Of the last word some bits, of words after it none.
        inside = tl.minimum(last_block + 1 - words * 32, 32)
        word = tl.where(inside > 0, word & ~(-2 << (tl.maximum(inside, 1) - 1)), 0)
        in_word = ones(word)
        before = count + tl.cumsum(in_word, 0) - in_word
        rank = before[:, None] + ones(word[:, None] & ((1 << place) - 1))
        tl.store(list_ptr + rank, words[:, None] * 32 + place, mask=((word[:, None] >> place) & 1) != 0)
        count += tl.sum(in_word, 0)
        word = tl.load(bits_ptr + words + WORDS, mask=words + WORDS <= last_block // 32, other=0)
    tl.debug_barrier()
    return count


@jit
def look_up(
    list_ptr, begin, end, table_ptr, to_ptr, len_k, BLOCK_K: tl.constexpr, PAGE: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Write the pages of a list's blocks from ``begin`` to ``end``: one of each, or those that a block spans.

    ``table_ptr`` has the sequence's pages of ``PAGE`` tokens, of which those past its keys are not looked up.
    """
    EACH: tl.constexpr = (BLOCK_K + PAGE - 1) // PAGE
    ahead = tl.arange(0, AHEAD)
    for start in range(begin * EACH, end * EACH, AHEAD):
        here = ahead < end * EACH - start
        if EACH == 1:
            block = tl.load(list_ptr + start + ahead, mask=here, other=0)
            page = tl.load(table_ptr + block // (PAGE // BLOCK_K), mask=here, other=0)
        else:
            block = tl.load(list_ptr + (start + ahead) // EACH, mask=here, other=0)
            which = block * EACH + (start + ahead) % EACH
            page = tl.load(table_ptr + which, mask=here & (which * PAGE < len_k), other=0)
        tl.store(to_ptr + start + ahead, page, mask=here)
    tl.debug_barrier()


@jit
def sequence_at(token, starts_q_ptr, sequences, SEQUENCES: tl.constexpr):
    """Return the number of the packed sequence that a query token is of."""
    s = tl.arange(0, SEQUENCES)
    ends = tl.load(starts_q_ptr + 1 + s, mask=s < sequences, other=2147483647)
    return tl.sum((ends <= token).to(tl.int32), 0)


@jit
def step(
    q, acc, maximum, total, k_ptr, v_ptr, stride_kt, stride_vt, first_key, first_query, len_k, scale, softcap,
    SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, APART: tl.constexpr = 1,
):  # fmt: skip
    """Add ``BLOCK_N`` keys from ``first_key`` on to the running softmax.

    Scores times ``scale`` are capped, or else logarithms to base 2. ``first_query`` is the position of the
    tile's first query, and every next one's is ``APART`` later: 0 where the rows are heads of one token.
    """
    EXACT: tl.constexpr = q.dtype == tl.float32
    keys, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_ptrs = k_ptr + first_key.to(tl.int64) * stride_kt + (keys[None, :] * stride_kt + dims[:, None])
    here = (keys < len_k - first_key)[None, :] & (dims < D)[:, None]
    k = tl.load(k_ptrs, mask=here, other=0.0)
    v = load_tile(v_ptr, stride_vt, first_key, len_k - first_key, BLOCK_N, D, BLOCK_D)
    scores = score(q, k, scale)
    if SOFTCAP:
        scores = cap(scores * scale, softcap, EXACT)
    base2 = 1.4426950408889634 if SOFTCAP else scale
    # Only a row's own blocks hold keys after a query of the tile.
    if first_key + BLOCK_N > first_query + 1:
        later = (first_key + keys)[None, :] > (first_query + APART * tl.arange(0, BLOCK_M))[:, None]
        scores = tl.where(later, float("-inf"), scores)
    largest = tl.max(scores, 1) * (1.0 if EXACT else base2)
    p, fade, maximum, total = softmax_step(scores, largest, maximum, total, base2, EXACT, True)
    return add_product(acc * fade[:, None], p, v, scale), maximum, total


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


@jit(*LENGTHS, "stride_pages")
def attention_kernel(  # noqa: PLR0915
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
    pages_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    stride_bits_b,
    stride_bits_h,
    stride_bits_row,
    stride_pages,
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
    PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take query tiles from the counter until there are none left; ``PAGE`` is 0 where there are no pages."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    places = tl.arange(0, BLOCK_M)
    if PAGE:
        # A block's pages, or a part of one.
        EACH: tl.constexpr = (BLOCK_K + PAGE - 1) // PAGE
        list_ptr = scratch_ptr + tl.program_id(0) * (columns * (1 + EACH) + 2)
        page_list = list_ptr + columns + 1
    else:
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
        word = first_words(bits_row, last_block // 32, 32)
        count = expand(bits_row, word, list_ptr, last_block, 32)

        if PAGE:
            table = b
            if SEQUENCES > 0:
                table += sequence_at(token, starts_q_ptr, sequences, SEQUENCES)
            look_up(
                list_ptr, 0, count, pages_ptr + table * stride_pages, page_list, len_k, BLOCK_K, PAGE, 256
            )
            k_head, v_head = k_ptr + kv_head * k_strides[1], v_ptr + kv_head * v_strides[1]
        else:
            first_k = tl.cast(start_k, tl.int64)
            k_head = k_ptr + b * k_strides[0] + kv_head * k_strides[1] + first_k * k_strides[2]
            v_head = v_ptr + b * v_strides[0] + kv_head * v_strides[1] + first_k * v_strides[2]
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        log2_scale = scale if SOFTCAP else scale * 1.4426950408889634
        # What one unit of `maximum` is in natural logarithms.
        natural_scale = 1.0 if SOFTCAP else scale
        unit = natural_scale if EXACT else 0.6931471805599453
        maximum, total = softmax_start(sinks_ptr, head, unit, BLOCK_M, SINKS)

        # Lists are read one step ahead, so that the loads of keys and values never wait for them.
        block = tl.load(list_ptr)
        if PAGE:
            page = tl.load(page_list)
        for i in tl.range(0, count * STEPS, num_stages=STAGES):
            first_key = block * BLOCK_K + i % STEPS * BLOCK_N
            block = tl.load(list_ptr + (i + 1) // STEPS)
            k_from, v_from = k_head, v_head
            if PAGE:
                # Where the page would begin if all before it were in front of it.
                far, before = page.to(tl.int64), (first_key // PAGE * PAGE).to(tl.int64)
                k_from += far * k_strides[0] - before * k_strides[2]
                v_from += far * v_strides[0] - before * v_strides[2]
                page = tl.load(page_list + (i + 1) // (STEPS // EACH))
            acc, maximum, total = step(
                q, acc, maximum, total, k_from, v_from, k_strides[2], v_strides[2], first_key, first_query,
                len_k, log2_scale, softcap, SOFTCAP, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip

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
