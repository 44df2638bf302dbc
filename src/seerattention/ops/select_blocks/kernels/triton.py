"""The kernels of `select_blocks`: block scores of a chunk of rows, and what a rule takes of each row."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.language import jit, tl
from seerattention.ops.rules import store_bits, take


@jit("count")
def narrow(numbers, out, count, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Round numbers to the dtype of `out`, whose largest stands for all beyond it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(numbers + at, mask=at < count).to(tl.float32)
    number = tl.minimum(tl.maximum(number, -LARGEST), LARGEST)
    tl.store(out + at, number.to(out.dtype.element_ty), mask=at < count)


@jit("query_subs", "key_subs", "start", "stop", "width", "past", "strip")
def score(
    queries,
    keys,
    scores,
    totals,
    sequences,
    query_subs,
    key_subs,
    start,
    stop,
    width,
    stride,
    past,
    scale,
    strip,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_LOW: tl.constexpr,
    E_REST: tl.constexpr,
    SUBS_Q: tl.constexpr,
    SUBS_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HELD: tl.constexpr,
    JOINED: tl.constexpr,
    NEAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the scores of ``strip`` rows for BLOCK_N blocks; rows count from the first query summary.

    That one is at position ``past``. With EXACT, of the block that a row ends in only those summaries of
    keys count that begin by its end, and ``totals`` ``[B * H, tiles of blocks, 2, rows]`` get the largest
    score before that block and the sum of exponentials of differences from it. HELD summaries of each block
    stay in shared memory while rows pass.
    """
    across = tl.cdiv(width, BLOCK_N)
    top, left = start + (tl.program_id(1) // across) * strip, (tl.program_id(1) % across) * BLOCK_N
    bottom = tl.minimum(top + strip, stop)
    head = tl.program_id(0).to(tl.int64)
    batch, first_q = head // HEADS, queries + head * query_subs * E
    last_q, last_k = query_subs - 1, key_subs - 1
    if sequences is not None:
        entry = sequences + batch * 7
        batch = tl.load(entry).to(tl.int64)
        first_q = queries + ((head % HEADS) * query_subs + tl.load(entry + 1)) * E
        last_q, last_k, past = tl.load(entry + 2) - 1, tl.load(entry + 3) - 1, tl.load(entry + 5)
        bottom = tl.minimum(bottom, last_q // SUBS_Q + 1)
    first_k = keys + (batch * (HEADS // GROUP) + (head % HEADS) // GROUP) * key_subs * E
    to = scores + head * (stop - start) * stride
    if EXACT:
        totals += (head * across + left // BLOCK_N) * 2 * (stop - start)
    # Tiles of rows that end before the blocks begin are left out.
    top += tl.maximum((left * BLOCK_K - past) // BLOCK_Q - top, 0) // BLOCK_M * BLOCK_M
    if top < bottom:
        place, column = tl.arange(0, JOINED * BLOCK_N), left + tl.arange(0, BLOCK_N)
        for held in tl.static_range(0, SUBS_K, HELD):
            parts = ()
            # A product has the summaries of some places in all blocks, those of one place side by side.
            for sub in tl.static_range(held, held + HELD, JOINED):
                summary = (left + place % BLOCK_N) * SUBS_K + sub + place // BLOCK_N
                parts = parts + _keys(first_k, summary, last_k, E, E_LOW, E_REST)
            if held > 0:
                tl.debug_barrier()
            for tile in range(top, bottom, BLOCK_M):
                row = tile + tl.arange(0, BLOCK_M)
                best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
                for sub_q in range(SUBS_Q):
                    query = _queries(first_q, row * SUBS_Q + sub_q, last_q, E, E_LOW, E_REST)
                    for part in tl.static_range(HELD // JOINED):
                        product = _product(query, parts, part, E_REST, PRECISION)
                        # The maximum over places is one within a thread, and so is that over products.
                        best = tl.maximum(best, tl.max(tl.reshape(product, [BLOCK_M, JOINED, BLOCK_N]), 1))
                best *= scale
                at = to + (row - start)[:, None] * stride + column[None, :]
                kept = (row < bottom)[:, None] & (column < width)[None, :]
                if held > 0:
                    best = tl.maximum(best, tl.load(at, mask=kept, other=float("-inf")))
                tl.store(at, best, mask=kept)
                if EXACT and held + HELD == SUBS_K:
                    _store_totals(
                        best, totals + (row - start), stop - start, past + (row + 1) * BLOCK_Q - 1,
                        past + (tile + 1) * BLOCK_Q - 1, left, width, row < bottom, BLOCK_K, BLOCK_N,
                    )  # fmt: skip
        if EXACT:
            tl.debug_barrier()
            after = tl.cdiv(tl.maximum((left + BLOCK_N) * BLOCK_K - past, 0), BLOCK_Q)
            for tile in range(top, tl.minimum(bottom, after), BLOCK_M):
                row = tile + tl.arange(0, BLOCK_M)
                query = _queries(first_q, row, last_q, E, E_LOW, E_REST)
                own, best = _own_block(
                    query, first_k, tile, last_k, past, E, E_LOW, E_REST, SUBS_K, BLOCK_Q, BLOCK_K, BLOCK_M,
                    NEAR, PRECISION,
                )  # fmt: skip
                kept = (row < bottom) & (own >= left) & (own < tl.minimum(left + BLOCK_N, width))
                tl.store(to + (row - start) * stride + own, best * scale, mask=kept)


@jit
def _store_totals(
    scores, to, step, ends, first_end, left, width, kept, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store of rows that end at ``ends``, the first of them first, what `score` says of totals."""
    # Most tiles lie before the blocks that their rows end in, and need no mask.
    if left + BLOCK_N > tl.minimum(first_end // BLOCK_K, width):
        stop = tl.minimum(ends // BLOCK_K, width)
        before = (left + tl.arange(0, BLOCK_N))[None, :] < stop[:, None]
        scores = tl.where(before, scores, float("-inf"))
    largest = tl.maximum(tl.max(scores, 1), -3e38)
    # Triton's exp takes five operations, its exp2 one.
    total = tl.sum(tl.exp2((scores - largest[:, None]) * 1.4426950408889634), 1)
    tl.store(to, largest, mask=kept)
    tl.store(to + step, total, mask=kept)


@jit
def _own_block(
    query, keys, tile, last_k, past, E: tl.constexpr, E_LOW: tl.constexpr, E_REST: tl.constexpr,
    SUBS_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the block that each row ends in and the row's largest product there, without what begins later.

    A product of its own, with summaries as they lie: masks in the loop over all blocks would take the
    registers of a third program.
    """
    TOKENS: tl.constexpr = BLOCK_K // SUBS_K
    ends = past + (tile + tl.arange(0, BLOCK_M) + 1) * BLOCK_Q - 1
    own = ends // BLOCK_K
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first = (past + (tile + 1) * BLOCK_Q - 1) // BLOCK_K * SUBS_K
    last = (past + (tile + BLOCK_M) * BLOCK_Q - 1) // TOKENS
    for begin in range(first, last + 1, NEAR):
        near = begin + tl.arange(0, NEAR)
        product = _product(query, _keys(keys, near, last_k, E, E_LOW, E_REST), 0, E_REST, PRECISION)
        seen = (near // SUBS_K)[None, :] == own[:, None]
        seen &= (near * TOKENS)[None, :] <= ends[:, None]
        best = tl.maximum(best, tl.max(tl.where(seen, product, float("-inf")), 1))
    return own, best


@jit
def _queries(queries, row, last, E: tl.constexpr, E_LOW: tl.constexpr, E_REST: tl.constexpr):
    """Load summaries ``[rows, E_LOW]`` and, if any, the ``E_REST`` numbers after them; the last past it."""
    e = tl.arange(0, E_LOW)
    at = queries + tl.minimum(row, last)[:, None] * E
    query = tl.load(at + e[None, :], mask=(e < E)[None, :], other=0.0)
    rest = query
    if E_REST > 0:
        more = E_LOW + tl.arange(0, E_REST)
        rest = tl.load(at + more[None, :], mask=(more < E)[None, :], other=0.0)
    return query, rest


@jit
def _keys(keys, column, last, E: tl.constexpr, E_LOW: tl.constexpr, E_REST: tl.constexpr):
    """Load summaries as `_queries` does, turned: ``[E_LOW, columns]`` and the rest, one tuple."""
    e = tl.arange(0, E_LOW)
    # A short last block repeats its last summary: equal to an earlier one, it changes no maximum.
    at = keys + tl.minimum(column, last)[None, :] * E
    parts = (tl.load(at + e[:, None], mask=(e < E)[:, None], other=0.0),)
    if E_REST > 0:
        more = E_LOW + tl.arange(0, E_REST)
        rest = tl.load(at + more[:, None], mask=(more < E)[:, None], other=0.0)
        parts = parts + (rest,)  # noqa: RUF005, Triton has no stars
    return parts


@jit
def _product(query, parts, part: tl.constexpr, E_REST: tl.constexpr, PRECISION: tl.constexpr):
    """Return the product of summaries that `_queries` loaded and some of those that `_keys` did."""
    PARTS: tl.constexpr = 2 if E_REST > 0 else 1
    product = tl.dot(query[0], parts[part * PARTS], input_precision=PRECISION)
    if E_REST > 0:
        rest = tl.dot(query[1], parts[part * PARTS + 1], product, input_precision=PRECISION)
        product = rest
    return product


@jit("first", "rows", "across", "all_rows", "words", "tokens", "past", "sink", "local", "dense_from")
def choose(
    scores,
    totals,
    bits,
    sequences,
    first,
    rows,
    stride,
    across,
    all_rows,
    words,
    tokens,
    past,
    value,
    values,
    row_exponent,
    sink,
    local,
    dense_from,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    TOGETHER: tl.constexpr,
    KIND: tl.constexpr,
    SLOPED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SUBS: tl.constexpr,
    WITHIN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Choose the blocks of one row; with EACH by the shares of so many query summaries' rows of scores.

    Of these, ``totals`` has the sums of ``across`` tiles of TILE blocks, as `score` writes them. SUBS is EACH
    or the power of two above it. With WITHIN all queries of a row are within one block. With STEPS scores are
    int16, see `_largest_in_steps`.
    """
    row, head = first + tl.program_id(1), tl.program_id(0).to(tl.int64)
    row_of_bits = head * all_rows + row
    if sequences is not None:
        entry = sequences + (head // HEADS) * 7
        tokens, past, value = tl.load(entry + 4), tl.load(entry + 5), tl.load(values + head)
        row_of_bits = (head % HEADS) * all_rows + tl.load(entry + 6) + row
        dense_from += tl.cdiv(tokens, BLOCK_Q) - all_rows
        if row * BLOCK_Q >= tokens:
            return
    elif values is not None:
        value = tl.load(values + head % HEADS)
    last = (tl.minimum((row + 1) * BLOCK_Q, tokens) - 1 + past) // BLOCK_K
    own = (row * BLOCK_Q + past) // BLOCK_K
    block = tl.arange(0, WIDTH)
    valid = block <= last
    # Up to the edge of a cache line, which rows of scores end at: loads of four then.
    stored = tl.cdiv(last + 1, 32) * 32
    at = scores + (head * rows + tl.program_id(1)) * tl.maximum(EACH, 1) * stride
    if EACH > 0:
        totals += head * across * 2 * rows * EACH + tl.program_id(1) * EACH
    if STEPS > 0:
        score = _largest_in_steps(
            at, stride, totals, rows * EACH, row, last, tokens, past, BLOCK_Q, BLOCK_K, EACH, SUBS, WIDTH,
            WITHIN, STEPS,
        )  # fmt: skip
        if KIND != 1:
            score = tl.where(valid, tl.cast(score, tl.float32) * (0.6931471805599453 / STEPS), float("-inf"))
    elif EACH > 0:
        total = _totals(
            at, stride, totals, rows * EACH, row, last, tokens, past, BLOCK_Q, BLOCK_K, EACH, SUBS, TILE,
            WIDTH,
        )  # fmt: skip
        score = _largest_shares(
            at, stride, stored, total, row, past, BLOCK_Q, BLOCK_K, EACH, SUBS, TOGETHER, WIDTH, WITHIN
        )
        score = tl.where(valid, score, float("-inf"))
    else:
        score = tl.where(valid, tl.load(at + block, mask=block < stored, other=0.0), float("-inf"))
    from_here = tl.where(row >= dense_from, 0, tl.maximum(own - local + 1, 0))
    always = (block < sink) | (block >= from_here)
    if STEPS == 0 or KIND != 1:
        always &= valid
    read = tl.minimum(tl.minimum(sink, from_here) + tl.maximum(last + 1 - from_here, 0), last + 1)
    if SLOPED:
        value *= tl.exp(row_exponent * tl.log((last + 1).to(tl.float32)))
    taken = take(score, valid, always, read, value, KIND, 1)
    store_bits(taken, bits + row_of_bits * words, words)


@jit
def _largest_shares(
    scores, stride, stored, total, row, past, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EACH: tl.constexpr, SUBS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr,
    WITHIN: tl.constexpr,
):  # fmt: skip
    """Return the logarithms of the largest shares of a row's blocks, ``[WIDTH]``; any past its last."""
    block = tl.arange(0, WIDTH)
    best = tl.full([WIDTH], float("-inf"), tl.float32)
    for first in range(0, EACH, TOGETHER):
        # Some rows at a time, so that enough is on its way.
        products = ()
        for sub in tl.static_range(TOGETHER):
            product = tl.load(scores + (first + sub) * stride + block, mask=block < stored, other=0.0)
            products = products + (product,)  # noqa: RUF005, Triton has no stars
        for sub in tl.static_range(TOGETHER):
            product = products[sub]
            product -= tl.sum(tl.where(tl.arange(0, SUBS) == first + sub, total, 0.0), 0)
            if not WITHIN:
                end = (row * BLOCK_Q + (first + sub + 1) * (BLOCK_Q // EACH) - 1 + past) // BLOCK_K
                product = tl.where(block <= end, product, float("-inf"))
            best = tl.maximum(best, product)
    return best


@jit
def _largest_in_steps(
    scores, stride, totals, step, row, last, tokens, past, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EACH: tl.constexpr, SUBS: tl.constexpr, WIDTH: tl.constexpr, WITHIN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Return what `_largest_shares` does in steps, int32 ``[WIDTH]``, of scores that are int16.

    A factor of 2 has STEPS. Scores are differences from the largest of their 32 blocks, from 0 to -2^14,
    where all that is less ends, and so are those of the largest from the total, which take their place: a
    Hopper GPU adds two pairs and compares both with two others by one instruction.
    """
    tile, sub = tl.arange(0, WIDTH // 32), tl.arange(0, SUBS)
    token = row * BLOCK_Q + sub * (BLOCK_Q // EACH)
    here = (sub < EACH) & (token < tokens)
    end = (token + BLOCK_Q // EACH - 1 + past) // BLOCK_K
    if WITHIN:
        end = (row * BLOCK_Q + past) // BLOCK_K + tl.zeros_like(sub)
    at, held = totals + tile[None, :] * 2 * step + sub[:, None], (tile * 32 <= last)[None, :]
    if SUBS > EACH:
        held &= (sub < EACH)[:, None]
    largest, total = tl.load(at, mask=held, other=-3e38), tl.load(at + step, mask=held, other=0.0)
    # What lies before the block that a row ends in, and that one.
    begun = (tile * 32)[None, :] < tl.minimum(end, last + 1)[:, None]
    before = tl.where(begun, largest, -3e38)
    there = here & (end <= last)
    own = tl.cast(tl.load(scores + sub * stride + end, mask=there, other=0), tl.float32) / STEPS
    own += tl.load(totals + end // 32 * 2 * step + sub, mask=there, other=0.0)
    own = tl.where(there, own, -3e38)
    highest = tl.maximum(tl.max(before, 1), own)
    total = tl.where(begun, total * _fast("ex2", before - highest[:, None]), 0.0)
    total = highest + _fast("lg2", tl.sum(total, 1) + _fast("ex2", own - highest))
    # Added to 1.5 * 2^23 a number is rounded to an integer, which the last bits hold: both halves of a word.
    less = tl.where(here[:, None], (largest - total[:, None]) * STEPS, float("-inf"))
    less = tl.maximum(less, -(2.0**14)) + 12582912.0
    pair = (less.to(tl.int32, bitcast=True) & 0xFFFF) * 65537
    tl.debug_barrier()
    tl.store(at.to(tl.pointer_type(tl.int32), bitcast=True), pair, mask=held)
    tl.debug_barrier()

    at = (totals + tile * 2 * step).to(tl.pointer_type(tl.int32), bitcast=True)
    word = tile[:, None] * 16 + tl.arange(0, 16)[None, :]
    words = scores.to(tl.pointer_type(tl.int32), bitcast=True) + word
    stored = tile * 32 <= last
    best = tl.full([WIDTH // 32, 16], -0x7FFF8000, tl.int32)
    for i in tl.static_range(EACH):
        product = tl.load(words + i * (stride // 2), mask=stored[:, None], other=0)
        less = tl.load(at + i, mask=stored, other=0)[:, None]
        if not WITHIN:
            end = (row * BLOCK_Q + (i + 1) * (BLOCK_Q // EACH) - 1 + past) // BLOCK_K
            unseen = tl.where(2 * word > end, 0xFFFF, 0) | tl.where(2 * word + 1 > end, -0x10000, 0)
            product = (product & ~unseen) | (-0x3FFFC000 & unseen)
            less = (less & ~unseen) | (-0x3FFFC000 & unseen)
        best = tl.inline_asm_elementwise(
            "{ .reg .b32 sum; add.s16x2 sum, $1, $2; max.s16x2 $0, sum, $3; }", "=r,r,r,r",
            [product, less, best], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.reshape(tl.join((best << 16) >> 16, best >> 16), [WIDTH])


@jit
def _fast(name: tl.constexpr, x):
    """Return 2 to the power of a number, ``ex2``, or its logarithm, ``lg2``, by one instruction."""
    return tl.inline_asm_elementwise(
        name + ".approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@jit
def _totals(
    scores, stride, totals, step, row, last, tokens, past, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EACH: tl.constexpr, SUBS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the logarithms of the sums of exponentials of a row's EACH rows of scores, inf where none is.

    Of tiles before the block that each ends in, as `score` writes them, and of that one, unless it is past
    ``last``.
    """
    sub, tile = tl.arange(0, SUBS), tl.arange(0, (WIDTH + TILE - 1) // TILE)
    token = row * BLOCK_Q + sub * (BLOCK_Q // EACH)
    end, here = (token + BLOCK_Q // EACH - 1 + past) // BLOCK_K, (sub < EACH) & (token < tokens)
    begun = here[:, None] & ((tile * TILE)[None, :] < tl.minimum(end, last + 1)[:, None])
    at = totals + tile[None, :] * 2 * step + sub[:, None]
    highest = tl.load(at, mask=begun, other=-3e38)
    total = tl.load(at + step, mask=begun, other=0.0)
    there = here & (end <= last)
    own = tl.load(scores + sub * stride + end, mask=there, other=-3e38)
    largest = tl.maximum(tl.max(highest, 1), own)
    total = tl.sum(total * tl.exp(highest - largest[:, None]), 1) + tl.exp(own - largest)
    return tl.where(here, largest + tl.log(total), float("inf"))
