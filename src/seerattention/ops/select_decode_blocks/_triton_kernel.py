"""The device functions; `triton.py` beside this file starts them."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.language import jit, release, tl, wait
from seerattention.ops.rules import store_bits, take


@jit("rows", "tokens")
def query_kernel(
    q_ptr,
    weight_ptr,
    out_ptr,
    counters_ptr,
    q_strides,
    rows,
    tokens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    POOLS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Project one query head's part of the summaries of ``BLOCK_M`` tokens onto ``BLOCK_N`` numbers.

    Parts are fp32 ``[rows, Hk, G, E]``. A token alone is its own maximum, minimum and mean.
    """
    ACROSS: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    kv_head, in_group = (tl.program_id(0) // ACROSS).to(tl.int64), tl.program_id(1)
    head = kv_head * GROUP + in_group
    d, e = tl.arange(0, BLOCK_D), tl.program_id(0) % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = ()
    # No launch makes weights: they are asked for before the wait.
    for pool in tl.static_range(POOLS):
        at = weight_ptr + ((head * POOLS + pool) * D + d)[:, None] * E + e[None, :]
        here = (d < D)[:, None] & (e < E)[None, :]
        weights = weights + (tl.load(at, mask=here, other=0.0),)  # noqa: RUF005, Triton has no stars
    wait(PDL)
    # What comes next reads summaries before it waits: it may come now that all before this launch is written.
    release(PDL)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = (
        q_ptr
        + (row // tokens).to(tl.int64) * q_strides[0]
        + head * q_strides[1]
        + row % tokens * q_strides[2]
    )
    x = tl.load(at[:, None] + d[None, :], mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
    x = x.to(weight_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for pool in tl.static_range(POOLS):
        total = tl.dot(x, weights[pool], total, input_precision=PRECISION)
    at = out_ptr + ((row.to(tl.int64) * KV_HEADS + kv_head) * GROUP + in_group)[:, None] * E + e[None, :]
    tl.store(at, total, mask=(row < rows)[:, None] & (e < E)[None, :])
    if tl.program_id(0) % ACROSS + in_group == 0:
        tl.store(counters_ptr + row * KV_HEADS + kv_head, 0, mask=row < rows)


@jit
def load_turn(
    norm_ptr, cos_ptr, sin_ptr, inside, position,
    E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Load what summaries are normalised and rotated by: weights of the norm, the other halves', cos, sin."""
    e = tl.arange(0, E_PAD)[None, :]
    here = inside[:, None] & (e < E)
    norm = tl.full([1, E_PAD], 1.0, tl.float32)
    norm_other = norm
    cos = tl.full([ROWS, E_PAD], 1.0, tl.float32)
    sin = cos
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        norm_other = tl.load(norm_ptr + other_half(e, E), mask=e < E, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        turn = position.to(tl.int64)[:, None] * E + e
        cos = tl.load(cos_ptr + turn, mask=here, other=0.0)
        sin = tl.load(sin_ptr + turn, mask=here, other=0.0)
    return norm, norm_other, cos, sin


@jit
def other_half(e, E: tl.constexpr):
    """Return the entry that a rotation mixes with each of a summary's: entry i with entry i + E / 2."""
    return tl.where(e < E // 2, e + E // 2, e - E // 2)


@jit
def finish_query(
    parts_ptr, norm_ptr, cos_ptr, turn, inside, eps, stride,
    GROUP: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up a group's parts of ``ROWS`` tokens' summaries, normalise and rotate: ``[ROWS, E_PAD]``."""
    norm, norm_other, cos, sin = turn
    e = tl.arange(0, E_PAD)[None, :]
    here = inside[:, None] & (e < E)
    parts, others = (), ()
    for part in tl.static_range(GROUP):
        at = parts_ptr + tl.arange(0, ROWS)[:, None] * stride + part * E
        parts = parts + (tl.load(at + e, mask=here, other=0.0),)  # noqa: RUF005, Triton has no stars
        if cos_ptr is not None:
            others = others + (tl.load(at + other_half(e, E), mask=here, other=0.0),)  # noqa: RUF005
    if ROWS * E_PAD <= 256:
        # All are asked for before one is waited for; more of them would not fit the registers.
        tl.debug_barrier()
    own = tl.zeros([ROWS, E_PAD], tl.float32)
    mixed = own
    for part in tl.static_range(GROUP):
        own += parts[part]
        if cos_ptr is not None:
            mixed += others[part]
    if norm_ptr is not None:
        factor = (1 / tl.sqrt(tl.sum(own * own, 1) / E + eps))[:, None]
        own *= factor * norm
        mixed *= factor * norm_other
    if cos_ptr is not None:
        own *= cos
        own += tl.where(e < E // 2, -mixed, mixed) * sin
    return own


@jit
def load_keys(
    keys, stride, first, end, piece,
    E: tl.constexpr, E_PAD: tl.constexpr, SUBS: tl.constexpr, BLOCK_N: tl.constexpr, WAYS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Load a piece of the summaries of blocks from ``first`` on, ``[E_PAD, BLOCK_N]``; zeros from ``end`` on.

    Columns are ``[WAYS, blocks, RUN]``, in memory ``[blocks, WAYS, RUN]``: what a warp loads at once is a run
    or several, so that it holds all of a block, whose maximum then needs no other warp.
    """
    BLOCKS: tl.constexpr = BLOCK_N // (WAYS * RUN)
    column, e = tl.arange(0, BLOCK_N), tl.arange(0, E_PAD)[:, None]
    block, run = column // RUN % BLOCKS, piece * WAYS + column // (RUN * BLOCKS)
    sub = run * RUN + column % RUN
    if SUBS % (WAYS * RUN) != 0:
        # What a block does not have is its last one again.
        sub = tl.minimum(sub, SUBS - 1)
    at = keys + tl.cast(first, tl.int64) * SUBS * stride + ((block * SUBS + sub)[None, :] * stride + e)
    return tl.load(at, mask=(block < end - first)[None, :] & (e < E), other=0.0)


@jit
def score_tile(query, key, ALONE: tl.constexpr, WAYS: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply queries with a tile of summaries: maxima over the ways, fp32 ``[rows, BLOCK_N // WAYS]``.

    Queries are ``[rows, E_PAD]``, one ``ALONE`` is fp32 ``[E_PAD, 1]``.
    """
    if ALONE:
        # No work for matrix units, whose operands would pass through shared memory.
        product = tl.sum(key.to(tl.float32) * query, 0)[None, :]
    else:
        product = tl.dot(query, key, input_precision=PRECISION)
    if WAYS > 1:
        product = tl.max(tl.reshape(product, [product.shape[0], WAYS, product.shape[1] // WAYS]), 1)
    return product


@jit
def choose_row(
    scores, to, length, token, tokens, words, value, sink, local,
    BLOCK_K: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write the bits of one token and KV head, whose scores these are."""
    position = length - tokens + token
    own = tl.where(position < 0, -1, position // BLOCK_K)
    block = tl.arange(0, WIDTH)
    always = ((block < sink) | (block > own - local)) & (block <= own)
    read = tl.minimum(own + 1, sink + local)
    finished = (block + 1) * BLOCK_K <= position + 1
    # From other programs: not what a cache of this one may hold. What is not finished may hold anything.
    score = tl.load(scores + block, mask=block < words * 32, other=0.0, cache_modifier=".cg")
    score = tl.where(finished, score, float("-inf"))
    store_bits(take(score, finished, always, read, value, KIND, BITS), to, words)


@jit("tokens", "chunk", "words", "sink", "local")
def score_kernel(
    parts_ptr,
    keys_ptr,
    scores_ptr,
    bits_ptr,
    counters_ptr,
    lengths_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    key_strides,
    tokens,
    chunk,
    words,
    scale,
    eps,
    value,
    sink,
    local,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WAYS: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Score ``chunk`` blocks for the tokens of one sequence and KV head, those finished for the last one.

    If ``TOGETHER``, the last program of a row chooses: of one token.
    """
    pair = tl.program_id(0).to(tl.int64)
    b, kv_head = pair // KV_HEADS, pair % KV_HEADS
    length = tl.load(lengths_ptr + b)
    first = tl.program_id(1) * chunk
    end = tl.minimum(length // BLOCK_K, first + chunk)
    keys = keys_ptr + b * key_strides[0] + kv_head * key_strides[1]
    key = load_keys(keys, key_strides[2], first, end, 0, E, E_PAD, SUBS, BLOCK_N, WAYS, RUN)
    BLOCKS: tl.constexpr = BLOCK_N // (WAYS * RUN)
    PIECES: tl.constexpr = (SUBS + WAYS * RUN - 1) // (WAYS * RUN)
    ALONE: tl.constexpr = ROWS == 1 and SUBS > 1
    # So many copies of a token alone that threads hold a number each: of one row, each would load all numbers
    # that it multiplies with.
    COPIES: tl.constexpr = 256 // E_PAD if ALONE else ROWS
    token, stride = tl.arange(0, COPIES), KV_HEADS * GROUP * E
    if ALONE:
        token, stride = token * 0, 0
    # A sequence shorter than its queries has some before its beginning, which read nothing.
    position = tl.maximum(length - tokens + token, 0)
    turn = load_turn(norm_ptr, cos_ptr, sin_ptr, token < tokens, position, E, E_PAD, COPIES)
    wait(PDL)
    if first < end:
        parts = parts_ptr + (b * tokens * KV_HEADS + kv_head) * GROUP * E
        query = finish_query(
            parts, norm_ptr, cos_ptr, turn, token < tokens, eps, stride, GROUP, E, E_PAD, COPIES,
        ).to(keys_ptr.dtype.element_ty)  # fmt: skip
        M: tl.constexpr = 1 if ALONE else BLOCK_M
        row = tl.arange(0, M)
        if ALONE:
            query = tl.max(query.to(tl.float32), 0)[:, None]
        else:
            # One token fills all rows of a tile.
            query = tl.broadcast_to(query, [BLOCK_M, E_PAD])
        to = scores_ptr + (pair * tokens + row)[:, None] * words * 32
        best = tl.full([M, BLOCKS * RUN], float("-inf"), tl.float32)
        for i in range(0, tl.cdiv(end - first, BLOCKS) * PIECES):
            # Summaries are read one step ahead.
            following = first + (i + 1) // PIECES * BLOCKS
            ahead = load_keys(
                keys, key_strides[2], following, end, (i + 1) % PIECES, E, E_PAD, SUBS, BLOCK_N, WAYS, RUN
            )
            product = score_tile(query, key, ALONE, WAYS, PRECISION)
            best = tl.where(i % PIECES == 0, product, tl.maximum(best, product))
            largest = best
            if RUN > 1:
                largest = tl.max(tl.reshape(best, [M, BLOCKS, RUN]), 2)
            block = first + i // PIECES * BLOCKS + tl.arange(0, BLOCKS)
            kept = (row < tokens)[:, None] & (block < end)[None, :] & (i % PIECES == PIECES - 1)
            tl.store(to + block[None, :], largest * scale, mask=kept)
            key = ahead
    release(PDL)
    if TOGETHER:
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            choose_row(
                scores_ptr + pair * words * 32, bits_ptr + pair * words, length, 0, 1, words, value, sink,
                local, BLOCK_K, KIND, WIDTH, BITS,
            )  # fmt: skip


@jit("tokens", "words", "sink", "local")
def choose_kernel(
    scores_ptr,
    bits_ptr,
    lengths_ptr,
    tokens,
    words,
    value,
    sink,
    local,
    KV_HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Choose the blocks of one token and KV head."""
    row = tl.program_id(0).to(tl.int64)
    wait(PDL)
    length = tl.load(lengths_ptr + row // tokens // KV_HEADS)
    choose_row(
        scores_ptr + row * words * 32, bits_ptr + row * words, length, (row % tokens).to(tl.int32), tokens,
        words, value, sink, local, BLOCK_K, KIND, WIDTH, BITS,
    )  # fmt: skip
