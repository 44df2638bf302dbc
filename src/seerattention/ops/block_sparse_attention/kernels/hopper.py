"""The Hopper kernel in Gluon, triton's language with explicit layouts, barriers and warp roles.

A multiprocessor runs one persistent program of two consumers (a warpgroup each, 64 queries) and their
producers (a warp each). A producer takes the next query tile from a counter, reads its row of the
selection's bits from the last block to the first and copies keys and values into a ring of pairs of
64-token tiles by TMA. Its consumer multiplies pairs: while softmax works on one, the tensor cores multiply
the probabilities of the one before. The first of an odd number of tiles is a pair with itself, whose second
half is masked. Only tiles at a row's end need a causal mask, and they come first.

An item of work is ITEM_TILES query tiles of ITEM_HEADS neighbouring query heads, one or two in all. Two read
the same list of the same KV head: the halves of a query block, or one tile of two heads of a list. Then the
consumers take one each and read the ring of one producer, so each tile of K and V is loaded once for both.

`c` numbers a consumer, `r` a ring, `g` counts uses of a ring's slots since the start.
"""

# Gluon is a language of its own: a type checker of Python does not know it.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

#: Registers per thread: two consumers of 128 threads and the producers' warpgroup share 65,536.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

#: How tiles and pairs of tiles of 16-bit numbers lie in shared memory, for TMA and wgmma alike.
TILES = gl.NVMMASharedLayout(128, 16, 4)
PAIRS = gl.NVMMASharedLayout(128, 16, 2)

#: Numbers of a token in a copy: 128 bytes, as far as tokens lie next to each other in shared memory.
NUMBERS = gl.constexpr(64)

#: How a warpgroup holds 64 x 128 scores, and queries as a product's left side.
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
QUERIES = gl.constexpr(gl.DotOperandLayout(0, SCORES.value, 2))

# Called barrier since triton 3.7.
_synchronise = getattr(gl, "thread_barrier", None) or gl.barrier

# It has no underscore since triton 3.9.
_view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

# The copy is called async_load since triton 3.7.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def descriptor(x: Tensor, tile: int, numbers: int | None = None) -> Any:
    """Describe ``[B, H, T, D]`` for TMA copies of ``[tile, numbers or D]``; past the end tokens are zero."""
    # A dimension of one element may have any stride, TMA wants a multiple of 16 bytes.
    strides = [s if n > 1 else x.shape[3] for s, n in zip(x.stride(), x.shape, strict=True)][:3]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, tile, numbers or x.shape[3]], TILES)


@gluon.jit
def _place(item, sizes, ITEM_HEADS: gl.constexpr, ITEM_TILES: gl.constexpr):
    """Return an item's batch entry, KV head, first head and tile; a KV head's longest come first."""
    heads, kv_heads, tiles_q, _past, _queries = sizes
    groups = heads // kv_heads // ITEM_HEADS
    steps = gl.cdiv(tiles_q, ITEM_TILES)
    outer = item // (steps * groups)
    inner = item % (steps * groups)
    head = (outer % kv_heads * groups + inner % groups) * ITEM_HEADS
    return outer // kv_heads, outer % kv_heads, head, (steps - 1 - inner // groups) * ITEM_TILES


@gluon.jit
def _last_key_tile(tile, sizes, ITEM_TILES: gl.constexpr):
    """Return the tile of the last key that an item's queries may see."""
    _heads, _kv_heads, _tiles_q, past, queries = sizes
    return (past + gl.minimum((tile + ITEM_TILES) * 64, queries) - 1) // 64


@gluon.jit
def _slot(g, r: gl.constexpr, STAGES: gl.constexpr):
    return r * STAGES + g % STAGES


@gluon.jit
def _wait(channel, g, r: gl.constexpr, STAGES: gl.constexpr):
    mbarrier.wait(channel[2].index(_slot(g, r, STAGES)), (g // STAGES) & 1)


@gluon.jit
def _free(channel, g, r: gl.constexpr, STAGES: gl.constexpr):
    mbarrier.arrive(channel[3].index(_slot(g, r, STAGES)), count=1)


@gluon.jit
def _wait_free(channel, g, r: gl.constexpr, STAGES: gl.constexpr):
    mbarrier.wait(channel[3].index(_slot(g, r, STAGES)), ((g // STAGES) & 1) ^ 1)


@gluon.jit
def _put(
    desc, b, head, tile, next_head, next_tile, channel, g, r: gl.constexpr, STAGES: gl.constexpr,
    ALONE: gl.constexpr = False,
):  # fmt: skip
    """Copy two tiles of 64 tokens into the ring's next slot once it is free, or the first of them alone."""
    ring, _notes, full, _empty = channel
    D: gl.constexpr = ring.shape[2]
    slot = _slot(g, r, STAGES)
    _wait_free(channel, g, r, STAGES)
    mbarrier.expect(full.index(slot), (1 if ALONE else 2) * 64 * D * 2)
    # Numbers by numbers, the tokens of both tiles behind one another.
    parts = _view(ring.index(slot), ring.dtype, [2 * D // NUMBERS, 1, 1, 64, NUMBERS], TILES)
    for i in gl.static_range(D // NUMBERS):
        load_tile(desc, [b, head, tile * 64, i * NUMBERS], full.index(slot), parts.index(2 * i))
        if not ALONE:
            at = [b, next_head, next_tile * 64, i * NUMBERS]
            load_tile(desc, at, full.index(slot), parts.index(2 * i + 1))


@gluon.jit
def _note(channel, g, item, n, r: gl.constexpr, STAGES: gl.constexpr):
    """Write an item and its number of tiles beside the slot that will hold its queries."""
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    zero = gl.zeros([1], gl.int32, lane)
    slot = _slot(g, r, STAGES)
    _wait_free(channel, g, r, STAGES)
    channel[1].index(slot * 2).store(zero + item)
    channel[1].index(slot * 2 + 1).store(zero + n)


@gluon.jit
def _read_note(channel, g, part: gl.constexpr, r: gl.constexpr, STAGES: gl.constexpr):
    note = channel[1].index(_slot(g, r, STAGES) * 2 + part)
    return gl.sum(note.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _row(lists, b, head, tile, sizes, BLOCK_Q: gl.constexpr):
    """Return the address of a row of the selection."""
    bits, words, sel_batch, sel_heads, sel_rows = lists
    row = gl.where(sel_batch > 1, b, 0) * sel_heads + head // (sizes[0] // sel_heads)
    return bits + (row * sel_rows + tile * 64 // BLOCK_Q).to(gl.int64) * words


@gluon.jit
def _count(row, word, below, own, WORDS: gl.constexpr):
    """Count a row's blocks up to bit `own` of `word`."""
    at = gl.arange(0, WORDS, gl.BlockedLayout([1], [32], [1], [0]))
    w = gl.load(row + at, mask=at <= word, other=0)
    return gl.sum(libdevice.popc(gl.where(at == word, w & below | own, w)), 0)


@gluon.jit
def _produce(
    source,
    r: gl.constexpr,
    ITEM_HEADS: gl.constexpr,
    ITEM_TILES: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    WORDS: gl.constexpr,
):
    """Feed a ring: per item its queries, then keys and values of its tiles, two by two, keys first."""
    ALONE: gl.constexpr = ITEM_HEADS * ITEM_TILES == 1
    qd, kd, vd, lists, counter, items, sizes, channel = source
    g = 0
    item = gl.atomic_add(counter, 1)
    while item < items:
        b, kv_head, head, tile = _place(item, sizes, ITEM_HEADS, ITEM_TILES)
        following_item = gl.atomic_add(counter, 1)
        last_tile = _last_key_tile(tile, sizes, ITEM_TILES)
        row = _row(lists, b, head, tile, sizes, BLOCK_Q)
        word = last_tile // PARTS // 32
        # The own block is always read; bits above it would be acausal.
        own = 1 << (last_tile // PARTS % 32)
        w = gl.load(row + word) & (2 * own - 1) | own
        # The last block may reach past the last tile.
        surplus = (last_tile // PARTS + 1) * PARTS - 1 - last_tile
        n = _count(row, word, 2 * own - 1, own, WORDS) * PARTS - surplus
        _note(channel, g, item, n, r, STAGES)
        second_head = head + ITEM_HEADS - 1
        _put(qd, b, head, tile, second_head, tile + ITEM_TILES - 1, channel, g, r, STAGES, ALONE)
        g += 1
        # An odd row's first tile is a pair with itself. Values come behind the keys of the next pair.
        t = n & 1
        one = last_tile
        one_held = 0
        other_held = 0
        while word >= 0:
            following = gl.load(row + gl.maximum(word - 1, 0))
            while w != 0:
                bit = 31 - libdevice.clz(w)
                w = w ^ (1 << bit)
                for part in gl.static_range(PARTS):
                    j = (word * 32 + bit) * PARTS + (PARTS - 1 - part)
                    if j <= last_tile:
                        if (t & 1) == 1:
                            _put(kd, b, kv_head, one, kv_head, j, channel, g, r, STAGES)
                            g += 1
                            if t > 1:
                                _put(vd, b, kv_head, one_held, kv_head, other_held, channel, g, r, STAGES)
                                g += 1
                            one_held = one
                            other_held = j
                        one = j
                        t += 1
            w = following
            word -= 1
        _put(vd, b, kv_head, one_held, kv_head, other_held, channel, g, r, STAGES)
        g += 1
        item = following_item
    _note(channel, g, -1, 0, r, STAGES)
    mbarrier.arrive(channel[2].index(_slot(g, r, STAGES)), count=1)


@gluon.jit
def _mask(s, tile, first_query, end):
    """Mask keys after their query and columns from `end` on: those of `tile`, then of the one before it."""
    layout: gl.constexpr = s.type.layout
    column = gl.arange(0, 128, gl.SliceLayout(0, layout))
    key = gl.where(column < end, (tile - column // 64) * 64 + column % 64, 2**30)
    query = first_query + gl.arange(0, 64, gl.SliceLayout(1, layout))
    return gl.where(key[None, :] <= query[:, None], s, float("-inf"))


@gluon.jit
def _maxima_of(maxima, c: gl.constexpr, tiles_k):
    """Return where a consumer keeps its rows' largest scores, ``[tiles_k, 64]``; 64 more lie before."""
    return maxima + ((gl.program_id(0) * 2 + c).to(gl.int64) * (tiles_k + 1) + 1) * 64


@gluon.jit
def _largest(s, maxima, j, MAP: gl.constexpr):
    """Return each row's largest score; with MAP keep it, per tile, of tiles `j` and `j - 1`."""
    if MAP:
        row: gl.constexpr = gl.SliceLayout(1, s.type.layout)
        at = gl.arange(0, 64, row)
        top0, top1 = gl.max(s.reshape([64, 2, 64]), 2).split()
        top0 = gl.convert_layout(top0, row)
        top1 = gl.convert_layout(top1, row)
        gl.store(maxima + j * 64 + at, top0)
        # A tile that goes alone has no partner; what is kept here for the tile before is replaced later.
        gl.store(maxima + (j - 1) * 64 + at, top1)
        top = gl.maximum(top0, top1)
    else:
        top = gl.max(s, 1)
    return top


@gluon.jit
def _softmax(s, top, m, total, scale):
    """Go on with a running softmax, base 2: probabilities, maximum, sum and the factor of what was."""
    m_new = gl.maximum(m, top * scale)
    p = gl.exp2(s * scale - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, m_new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _scores(q, channel, g, r: gl.constexpr, STAGES: gl.constexpr):
    """Start the product of queries and a pair of tiles of keys."""
    keys = channel[0].index(_slot(g, r, STAGES))
    zero = gl.zeros([64, 128], gl.float32, SCORES)
    return warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _add_values(p, channel, g, o, r: gl.constexpr, STAGES: gl.constexpr):
    """Start the product of probabilities and a pair of tiles of values."""
    return warpgroup_mma(p, channel[0].index(_slot(g, r, STAGES)), o, is_async=True)


@gluon.jit
def _store(out, strides, lse, o, m, total, b, head, first, sizes, LSE: gl.constexpr):
    """Write 64 rows of the output from query `first` on."""
    heads, _kv_heads, _tiles_q, _past, queries = sizes
    layout: gl.constexpr = o.type.layout
    D: gl.constexpr = o.shape[1]
    if LSE:
        at = first + gl.arange(0, 64, m.type.layout)
        line = lse + (b * heads + head).to(gl.int64) * queries
        gl.store(line + at, (m + gl.log2(total)) * LN2, mask=at < queries)
    o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, layout))[:, None]
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, gl.SliceLayout(0, layout))
    vector = b.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + rows.to(gl.int64) * strides[2]
    where = out + (vector * D)[:, None] + columns[None, :]
    gl.store(where, o.to(out.dtype.element_ty), mask=(rows < queries)[:, None])


@gluon.jit
def _pool(maxima, shares, m, total, line, tile, last_tile, tiles_k, scale, sizes):
    """Write the largest probability of 64 queries for each tile of keys: a row of the pooled map."""
    _heads, _kv_heads, tiles_q, _past, queries = sizes
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 64, m.type.layout)
    # Rows past the last query have no share. The logarithms go through the 64 numbers before the maxima.
    log_sum = gl.where(tile * 64 + row < queries, m + gl.log2(total), float("inf"))
    gl.store(maxima - 64 + row, log_sum)
    _synchronise()
    across = gl.arange(0, 64, gl.SliceLayout(0, layout))
    log_sum = gl.load(maxima - 64 + across)
    shares += (line.to(gl.int64) * tiles_q + tile) * tiles_k
    for first in range(0, last_tile + 1, 32):
        j = first + gl.arange(0, 32, gl.SliceLayout(1, layout))
        inside = (j <= last_tile) & (tile < tiles_q)
        top = gl.load(maxima + j[:, None] * 64 + across[None, :], mask=inside[:, None], other=float("-inf"))
        gl.store(shares + j, gl.exp2(gl.max(top * scale - log_sum[None, :], 1)), mask=inside)
    # Nobody may keep the next row's maxima before all have read these.
    _synchronise()


@gluon.jit
def _consume(  # noqa: PLR0915
    target,
    c: gl.constexpr,
    ITEM_HEADS: gl.constexpr,
    ITEM_TILES: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    LSE: gl.constexpr,
    SINKS: gl.constexpr,
    MAP: gl.constexpr,
):
    """Compute attention of the items that a ring brings."""
    out, strides, lse, sinks, maxima, shares, tiles_k, sizes, scale, channel = target
    heads, _kv_heads, _tiles_q, past, _queries = sizes
    SHARE: gl.constexpr = ITEM_HEADS * ITEM_TILES == 2
    r: gl.constexpr = 0 if SHARE else c
    dtype: gl.constexpr = channel[0].dtype
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    maxima = _maxima_of(maxima, c, tiles_k)
    g = 0
    _wait(channel, g, r, STAGES)
    item = _read_note(channel, g, 0, r, STAGES)
    while item >= 0:
        n = _read_note(channel, g, 1, r, STAGES)
        b, _kv_head, head, tile = _place(item, sizes, ITEM_HEADS, ITEM_TILES)
        last_tile = _last_key_tile(tile, sizes, ITEM_TILES)
        mine: gl.constexpr = c * 64 if SHARE else 0
        q = channel[0].index(_slot(g, r, STAGES)).slice(mine, 64, 0).load(QUERIES)
        g += 1
        head += c * (ITEM_HEADS - 1)
        tile += c * (ITEM_TILES - 1)
        first_query = past + tile * 64
        # Tiles at the front that hold keys after the first query: they need the causal mask.
        late = last_tile - first_query // 64 + 1
        _wait(channel, g, r, STAGES)
        s = warpgroup_mma_wait(0, deps=[_scores(q, channel, g, r, STAGES)])
        # Only now: a barrier behind the copy into registers does not mean that it has happened, but a
        # product of them does. Freed earlier, queries were overwritten by keys, in one call of three.
        _free(channel, g - 1, r, STAGES)
        _free(channel, g, r, STAGES)
        g += 1
        t = 2 - (n & 1)
        s = _mask(s, last_tile, first_query, t * 64)
        # Finite, so that a row without a key in its first tiles has weight zero there and not NaN.
        m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
        o = gl.zeros([64, D], gl.float32, o_layout)
        p, m, total, alpha = _softmax(s, _largest(s, maxima, last_tile, MAP), m, total, scale)
        p = gl.convert_layout(p.to(dtype), p_layout)
        while t < n:
            _wait(channel, g, r, STAGES)
            s_done = _scores(q, channel, g, r, STAGES)
            _wait(channel, g + 1, r, STAGES)
            o = _add_values(p, channel, g + 1, o, r, STAGES)
            s = warpgroup_mma_wait(1, deps=[s_done])
            _free(channel, g, r, STAGES)
            if t < late:
                s = _mask(s, last_tile - t, first_query, 128)
            e, m, total, alpha = _softmax(s, _largest(s, maxima, last_tile - t, MAP), m, total, scale)
            o, p = warpgroup_mma_wait(0, deps=[o, p])
            _free(channel, g + 1, r, STAGES)
            o = o * gl.convert_layout(alpha, o_row)[:, None]
            p = gl.convert_layout(e.to(dtype), p_layout)
            g += 2
            t += 2
        _wait(channel, g, r, STAGES)
        o = warpgroup_mma_wait(0, deps=[_add_values(p, channel, g, o, r, STAGES)])
        _free(channel, g, r, STAGES)
        g += 1
        if SINKS:
            total += gl.exp2(gl.load(sinks + head) * LOG2E - m)
        _store(out, strides, lse, o, m, total, b, head, tile * 64, sizes, LSE)
        if MAP:
            _pool(maxima, shares, m, total, b * heads + head, tile, last_tile, tiles_k, scale, sizes)
        _wait(channel, g, r, STAGES)
        item = _read_note(channel, g, 0, r, STAGES)


# Sizes change with every prompt; compiling anew for round ones would gain nothing.
@gluon.jit(
    do_not_specialize=[
        *("stride_out_b", "stride_out_h", "stride_out_row"),
        *("items", "words", "sel_batch", "sel_heads", "sel_rows"),
        *("heads", "kv_heads", "tiles_q", "tiles_k", "past", "queries"),
    ]
)
def attend(
    qd,
    kd,
    vd,
    out,
    stride_out_b,
    stride_out_h,
    stride_out_row,
    lse,
    sinks,
    maxima,
    shares,
    bits,
    counter,
    items,
    words,
    sel_batch,
    sel_heads,
    sel_rows,
    heads,
    kv_heads,
    tiles_q,
    tiles_k,
    past,
    queries,
    scale,
    D: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    WORDS: gl.constexpr,
    ITEM_HEADS: gl.constexpr,
    ITEM_TILES: gl.constexpr,
    LSE: gl.constexpr,
    SINKS: gl.constexpr,
    MAP: gl.constexpr,
):
    """Compute attention of all items; launched with at most one program per multiprocessor.

    `qd`, `kd` and `vd` describe q ``[B, Hq, Tq, D]`` and k, v ``[B, Hk, Tk, D]``. `out` is
    ``[B, Hq, Tq, D]`` with its dimensions but the last in any order and no gaps, strides given in vectors
    of D numbers, `lse` fp32 ``[B, Hq, Tq]`` (written with LSE), `sinks` fp32 ``[Hq]`` (read with
    SINKS), `bits` int32 ``[sel_batch, sel_heads, sel_rows, words]``. `counter` is zero and counts the
    `items` taken, ITEM_HEADS times ITEM_TILES tiles of queries each. `past` is the number of keys
    before the first query, `scale` the softmax scale times log2(e). A KV block has PARTS tiles, WORDS is
    `words` rounded up to a power of two.

    With MAP every tile of keys up to the last must be read. `shares`, zeroed fp32 ``[B, Hq, tiles_q,
    tiles_k]``, gets the largest probability of each 64 queries and 64 keys; `maxima` is room for fp32
    ``[programs, 2, tiles_k + 1, 64]``.
    """
    SHARE: gl.constexpr = ITEM_HEADS * ITEM_TILES == 2
    rings: gl.constexpr = 1 if SHARE else 2
    ring = gl.allocate_shared_memory(qd.dtype, [rings * STAGES, 128, D], PAIRS)
    note_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    notes = gl.allocate_shared_memory(gl.int32, [rings * STAGES * 2, 1], note_layout)
    full = gl.allocate_shared_memory(gl.int64, [rings * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [rings * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(rings * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=3 - rings)
    fence_async_shared()
    sizes = (heads, kv_heads, tiles_q, past, queries)
    lists = (bits, words, sel_batch, sel_heads, sel_rows)
    channel = (ring, notes, full, empty)
    source = (qd, kd, vd, lists, counter, items, sizes, channel)
    strides = (stride_out_b, stride_out_h, stride_out_row)
    target = (out, strides, lse, sinks, maxima, shares, tiles_k, sizes, scale, channel)
    if SHARE:
        gl.warp_specialize(
            [
                (_consume, (target, 0, ITEM_HEADS, ITEM_TILES, D, STAGES, LSE, SINKS, MAP)),
                (_consume, (target, 1, ITEM_HEADS, ITEM_TILES, D, STAGES, LSE, SINKS, MAP)),
                (_produce, (source, 0, ITEM_HEADS, ITEM_TILES, BLOCK_Q, PARTS, STAGES, WORDS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (target, 0, ITEM_HEADS, ITEM_TILES, D, STAGES, LSE, SINKS, MAP)),
                (_consume, (target, 1, ITEM_HEADS, ITEM_TILES, D, STAGES, LSE, SINKS, MAP)),
                (_produce, (source, 0, ITEM_HEADS, ITEM_TILES, BLOCK_Q, PARTS, STAGES, WORDS)),
                (_produce, (source, 1, ITEM_HEADS, ITEM_TILES, BLOCK_Q, PARTS, STAGES, WORDS)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
