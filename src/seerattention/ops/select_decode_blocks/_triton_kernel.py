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
    if ROWS == 1:
        # All are asked for before one is waited for; those of several tokens would not fit the registers.
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
    keys, stride, block, end, sub,
    E: tl.constexpr, E_PAD: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """Load one summary of each of some blocks, ``[E_PAD, blocks]``; zeros from block ``end`` on."""
    e = tl.arange(0, E_PAD)[:, None]
    at = keys + (block.to(tl.int64) * SUBS + sub)[None, :] * stride + e
    return tl.load(at, mask=(block < end)[None, :] & (e < E), other=0.0)


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
    store_bits(take(score, finished, always, read, value, KIND, BITS) | always, to, words)


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
    block = first + tl.arange(0, BLOCK_N)
    key = load_keys(keys, key_strides[2], block, end, 0, E, E_PAD, SUBS)
    # One token fills all rows of a tile.
    token = tl.arange(0, ROWS)
    # A sequence shorter than its queries has some before its beginning, which read nothing.
    position = tl.maximum(length - tokens + token, 0)
    turn = load_turn(norm_ptr, cos_ptr, sin_ptr, token < tokens, position, E, E_PAD, ROWS)
    wait(PDL)
    if first < end:
        parts = parts_ptr + (b * tokens * KV_HEADS + kv_head) * GROUP * E
        query = finish_query(
            parts, norm_ptr, cos_ptr, turn, token < tokens, eps, KV_HEADS * GROUP * E, GROUP, E, E_PAD, ROWS,
        ).to(keys_ptr.dtype.element_ty)  # fmt: skip
        query = tl.broadcast_to(query, [BLOCK_M, E_PAD])
        row = tl.arange(0, BLOCK_M)
        to = scores_ptr + (pair * tokens + row)[:, None] * words * 32
        best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        for i in range(0, tl.cdiv(end - first, BLOCK_N) * SUBS):
            # Summaries are read one step ahead.
            following = first + (i + 1) // SUBS * BLOCK_N + tl.arange(0, BLOCK_N)
            ahead = load_keys(keys, key_strides[2], following, end, (i + 1) % SUBS, E, E_PAD, SUBS)
            product = tl.dot(query, key, input_precision=PRECISION)
            best = tl.where(i % SUBS == 0, product, tl.maximum(best, product))
            block = first + i // SUBS * BLOCK_N + tl.arange(0, BLOCK_N)
            kept = (row < tokens)[:, None] & (block < end)[None, :] & (i % SUBS == SUBS - 1)
            tl.store(to + block[None, :], best * scale, mask=kept)
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
