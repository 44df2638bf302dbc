"""Scores of shares in Gluon, Triton's language with explicit layouts, barriers and warp roles.

A multiprocessor runs one persistent program of two or three consumers (a warpgroup each) and two producers (a
warp each). An item is a tile of 32 blocks of keys, all of whose summaries lie in shared memory while a strip
of rows, query summaries, passes in tiles of 64, one consumer's after the other's. A product is of 64 rows and
of four places within all the blocks.

Of 16 bits, a consumer stores a tile of rows while the first products of its next one run. Of 8 bits, products
are added up in fp16, which halves maxima and registers: three consumers fit, one of whom multiplies while
others store.

`c` numbers a consumer, `g` counts uses of a ring's slots since the start. Items are numbered from the last
strip of rows and its first blocks, heads next to each other; program `i` of `n` takes `i`, `i + n`, ...
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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)

#: Rows of a tile, those of a warpgroup's wgmma; blocks of keys in a tile, and their places in a product.
ROWS, BLOCKS, PLACES = gl.constexpr(64), gl.constexpr(32), gl.constexpr(4)
COLUMNS = gl.constexpr(128)

#: Slots for tiles of rows of each consumer; tiles of keys have one or two.
QUERY_STAGES = gl.constexpr(3)

#: Registers per thread of two and of three consumers of 128 threads, who share 65,536 with the producers'.
TWO_REGISTERS, THREE_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(144), gl.constexpr(24)

#: How it holds scores: a thread has 8 blocks side by side, of two rows.
SCORES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 32],
    )
)

# The copy is called async_load since triton 3.7.
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.constexpr_function
def _sums(dtype):
    """In what products are added up: those of eight bits in fp16, whose maxima are two per instruction."""
    return gl.float16 if dtype.primitive_bitwidth == 8 else gl.float32


@gluon.constexpr_function
def _product_layout(dtype):
    """How a warpgroup holds a product: a step is of 32 bytes of each summary."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 256 // dtype.primitive_bitwidth])


@gluon.constexpr_function
def _queries_layout(dtype):
    """How it holds rows as the left side of that product."""
    return gl.DotOperandLayout(0, _product_layout(dtype), 32 // dtype.primitive_bitwidth)


def tiles(bits: int, rank: int) -> Any:
    """How 64 numbers of so many bits lie in shared memory, for TMA and wgmma alike.

    Tiles of rows are of rank 3, boxes of keys of rank 5.
    """
    return gl.NVMMASharedLayout(8 * bits, bits, rank)


def describe_queries(queries: Tensor) -> Any:
    """Describe summaries ``[B, H, rows, E]`` for TMA copies of 64 rows; those past the end read as zero."""
    batch, heads, rows, dim = queries.shape
    shape, strides = [batch * heads, rows, dim], [rows * dim, dim, 1]
    return TensorDescriptor(queries, shape, strides, [1, ROWS.value, dim], tiles(8 * queries.itemsize, 3))


def describe_keys(keys: Tensor, subs: int) -> Any:
    """Describe summaries ``[B, H, Nk * subs, E]`` for TMA copies of one place of 32 KV blocks.

    A thread of a warpgroup holds a product's columns in pairs, two of every eight. A box brings blocks in the
    order that makes what it holds neighbours: it counts pairs, then quarters of the tile, then the two of a
    pair. ``Nk`` must be a multiple of 8, whole quarters.
    """
    batch, heads, rows, dim = keys.shape
    block = subs * dim
    shape = [batch * heads, 4, rows // (8 * subs), 2, block]
    strides = [rows * dim, 2 * block, 8 * block, block, 1]
    return TensorDescriptor(keys, shape, strides, [1, 4, 4, 2, dim], tiles(8 * keys.itemsize, 5))


@gluon.jit
def _block(column):
    """Return the block of a product's column, among those of its place: see `describe_keys`."""
    return column % 8 // 2 * (BLOCKS // 4) + column // 8 * 2 + column % 2


@gluon.jit
def _strip(strip, sizes, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Return a strip's first row, the row after its last, and how many tiles of keys its rows see."""
    start, stop, past, across, rows = sizes
    bottom = stop - strip * rows
    seen = gl.minimum(across, (past + bottom * BLOCK_Q - 1) // (BLOCK_K * BLOCKS) + 1)
    return gl.maximum(start, bottom - rows), bottom, seen


@gluon.jit
def _find(item, strip, before, heads, sizes, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Return an item's strip, how many items there are before that strip, and whether there is one.

    It is sought from `strip` on, which `before` items come before.
    """
    start, stop, _past, _across, rows = sizes
    strips = gl.cdiv(stop - start, rows)
    _top, _bottom, seen = _strip(strip, sizes, BLOCK_Q, BLOCK_K)
    while (strip < strips) & (item >= before + seen * heads):
        before += seen * heads
        strip += 1
        _top, _bottom, seen = _strip(strip, sizes, BLOCK_Q, BLOCK_K)
    return strip, before, strip < strips


@gluon.jit
def _place(within, strip, heads, sizes, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Return the head, tile of keys and rows of an item of a strip; no tile ends before the keys."""
    top, bottom, _seen = _strip(strip, sizes, BLOCK_Q, BLOCK_K)
    tile = within // heads
    first = (tile * BLOCKS * BLOCK_K - sizes[2]) // BLOCK_Q
    top += gl.maximum(first - top, 0) // ROWS * ROWS
    return within % heads, tile, top, bottom


@gluon.jit
def _put(desc, coordinates, tiles, full, empty, g, first: gl.constexpr, STAGES: gl.constexpr):
    """Copy a tile of rows into the next slot of the ring that begins at slot `first`, once it is free."""
    slot = first + g % STAGES
    mbarrier.wait(empty.index(slot), ((g // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), ROWS * desc.block_shape[2] * tiles.dtype.primitive_bitwidth // 8)
    _load_tile(desc, coordinates, full.index(slot), tiles.index(slot))
    return g + 1


@gluon.jit
def _bring_queries(source, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Copy the rows of all items, tiles to one consumer after the other."""
    queries, tiles, full, empty, heads, sizes = source
    CONSUMERS: gl.constexpr = tiles.shape[0] // QUERY_STAGES
    g0 = 0
    g1 = 0
    g2 = 0
    item = gl.program_id(0)
    strip, before, more = _find(item, gl.to_tensor(0), gl.to_tensor(0), heads, sizes, BLOCK_Q, BLOCK_K)
    while more:
        head, _tile, top, bottom = _place(item - before, strip, heads, sizes, BLOCK_Q, BLOCK_K)
        for row in range(top, bottom, CONSUMERS * ROWS):
            g0 = _put(queries, [head, row, 0], tiles, full, empty, g0, 0, QUERY_STAGES)
            if row + ROWS < bottom:
                g1 = _put(queries, [head, row + ROWS, 0], tiles, full, empty, g1, QUERY_STAGES, QUERY_STAGES)
            if CONSUMERS == 3 and row + 2 * ROWS < bottom:
                at = [head, row + 2 * ROWS, 0]
                g2 = _put(queries, at, tiles, full, empty, g2, 2 * QUERY_STAGES, QUERY_STAGES)
        item += gl.num_programs(0)
        strip, before, more = _find(item, strip, before, heads, sizes, BLOCK_Q, BLOCK_K)


@gluon.jit
def _bring_keys(source, SUBS: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Copy all summaries of the blocks of all items, place by place."""
    keys, tiles, full, empty, heads, group, sizes = source
    E: gl.constexpr = keys.block_shape[4]
    KEY_STAGES: gl.constexpr = full.shape[0]
    g = 0
    item = gl.program_id(0)
    strip, before, more = _find(item, gl.to_tensor(0), gl.to_tensor(0), heads, sizes, BLOCK_Q, BLOCK_K)
    while more:
        head, tile, _top, _bottom = _place(item - before, strip, heads, sizes, BLOCK_Q, BLOCK_K)
        slot = g % KEY_STAGES
        mbarrier.wait(empty.index(slot), ((g // KEY_STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), SUBS * BLOCKS * E * tiles.dtype.primitive_bitwidth // 8)
        for part in gl.static_range(SUBS // PLACES):
            for place in gl.static_range(PLACES):
                to = tiles.index(slot * (SUBS // PLACES) + part).slice(place, 1, 0)
                at = [head // group, 0, tile * 4, 0, (part * PLACES + place) * E]
                _load_tile(keys, at, full.index(slot), to)
        g += 1
        item += gl.num_programs(0)
        strip, before, more = _find(item, strip, before, heads, sizes, BLOCK_Q, BLOCK_K)


@gluon.jit
def _product(query, keys, part):
    """Start a product with a tile of keys; one that is added up in fp16 is finished.

    Triton splits pairs of fp16 right away: of a product that is not there the assembler serialises all parts.
    """
    SUMS: gl.constexpr = _sums(keys.dtype)
    zero = gl.zeros([ROWS, COLUMNS], SUMS, _product_layout(keys.dtype))
    tile = keys.index(part).reshape([COLUMNS, keys.shape[5]])
    return warpgroup_mma(query, tile.permute((1, 0)), zero, use_acc=False, is_async=gl.float32 == SUMS)


@gluon.jit
def _pairs(name: gl.constexpr, a, b):
    """Return the ``max`` or ``min`` of two tiles of fp16, two at a time; compilers move nothing over it."""
    return gl.inline_asm_elementwise(
        name + ".f16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.float16, is_pure=False, pack=2
    )


@gluon.jit
def _by_place(product):
    """Return the maximum over the places of a product, ``[64, 32]``: one within each thread."""
    if product.dtype == gl.float16:
        first, second = product.reshape([ROWS, 2, COLUMNS // 2]).permute((0, 2, 1)).split()
        half = _pairs("max", first, second)
        first, second = half.reshape([ROWS, 2, BLOCKS]).permute((0, 2, 1)).split()
        best = _pairs("max", first, second)
    else:
        best = gl.max(product.reshape([ROWS, PLACES, BLOCKS]), 1)
    return best


@gluon.jit
def _larger(best, product):
    """Return the larger of `best` and the maximum over the places of a product."""
    # Compilers put maxima off until all products are there, which takes the registers of all of them. They
    # move nothing over assembly, which in fp32 does nothing.
    if product.dtype == gl.float16:
        best = _pairs("max", best, _by_place(product))
    else:
        best = gl.maximum(best, _by_place(product))
        best = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [best], gl.float32, is_pure=False, pack=1)
    return best


@gluon.jit
def _nothing(keys):
    LAYOUT: gl.constexpr = _product_layout(keys.dtype)
    return _by_place(gl.full([ROWS, COLUMNS], float("-inf"), _sums(keys.dtype), LAYOUT))


@gluon.jit
def _scores(query, keys, first, PARTS: gl.constexpr):
    """Return the largest product of each row with each block, ``[64, 32]``, of sums in fp16.

    The blocks' summaries are PARTS tiles of `keys` from the `first` on.
    """
    best = _nothing(keys)
    for part in gl.static_range(PARTS):
        best = _larger(best, _product(query, keys, first + part))
    return best


@gluon.jit
def _scores_and_store(query, keys, first, before, target, PARTS: gl.constexpr, STEPS: gl.constexpr):
    """Return the same of sums in fp32, and store those of the tile before while the first products run."""
    to, totals, where, sizes, stride, scale = target
    # Products are started and waited for in one branch: a branch in between may copy registers that the
    # tensor cores are still writing.
    waiting = _product(query, keys, first)
    best = _nothing(keys)
    if PARTS == 1:
        _store(before, to, totals, where, 0, sizes, stride, scale, True, STEPS, 1, 1)
    for part in gl.static_range(1, PARTS):
        following = _product(query, keys, first + part)
        if part == 1:
            _store(before, to, totals, where, 0, sizes, stride, scale, True, STEPS, 1, 1)
        best = _larger(best, warpgroup_mma_wait(1, deps=[waiting]))
        waiting = following
    return _larger(best, warpgroup_mma_wait(0, deps=[waiting]))


@gluon.jit
def _seen_scores(
    query, keys, first, end, SUBS: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr
):  # fmt: skip
    """Return the same of summaries that begin by a row's end; the first row's is `end`, from the keys on."""
    PRODUCT: gl.constexpr = _product_layout(keys.dtype)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, PRODUCT))
    # What differs between threads goes to the other side: constants are left on this, and not registers.
    same = _block(column % BLOCKS // 8 * 8 + column % 2) * BLOCK_K
    begin = same + column // BLOCKS * (BLOCK_K // SUBS)
    other = _block(column % 8 // 2 * 2) * BLOCK_K
    best = _nothing(keys)
    for part in range(SUBS // PLACES):
        product = _product(query, keys, first + part)
        if best.dtype == gl.float32:
            product = warpgroup_mma_wait(0, deps=[product])
        last = end - part * (PLACES * BLOCK_K // SUBS)
        ends = last + gl.arange(0, ROWS, gl.SliceLayout(1, PRODUCT)) * BLOCK_Q
        seen = begin[None, :] <= ends[:, None] - other[None, :]
        if product.dtype == gl.float16:
            most = gl.where(seen, gl.full_like(product, float("inf")), gl.full_like(product, float("-inf")))
            best = _larger(best, _pairs("min", product, most))
        else:
            best = _larger(best, gl.where(seen, product, gl.full_like(product, float("-inf"))))
    return best


@gluon.jit
def _exp2(x):
    """Return 2 to the power of a number by one instruction; below the smallest normal number it is 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _store(
    best, to, totals, where, end, sizes, stride, scale, ALL: gl.constexpr,
    STEPS: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Write scores and totals of 64 rows before row `kept`; with ALL they see all blocks to the end.

    Logarithms are to the base of 2. Scores are differences from the row's largest in steps, the least -2^14.
    """
    row, kept, left = where
    # Columns into the order of blocks: nothing moves but the names.
    best = best.reshape([ROWS, BLOCKS // 8, 4, 2]).permute((0, 2, 1, 3)).reshape([ROWS, BLOCKS])
    if best.dtype == gl.float16:
        # Sums beyond fp16 count as its largest.
        best = _pairs("min", best, gl.full_like(best, 65504.0))
    best = gl.convert_layout(best.to(gl.float32), SCORES)
    at = row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    block = left + gl.arange(0, BLOCKS, gl.SliceLayout(0, SCORES))
    # Differences from the largest in steps, and that in whole ones: added to ZERO a number is rounded to an
    # integer, which the last bits hold.
    ZERO: gl.constexpr = 12582912.0
    scale *= LOG2E * STEPS
    shift = ZERO - gl.maximum(gl.max(best, 1), -1e30) * scale
    steps = gl.maximum(best * scale + shift[:, None], ZERO - 16384.0)
    power = _exp2(steps * (1 / STEPS) - ZERO / STEPS)
    if not ALL:
        own = (end + (at - row) * BLOCK_Q) // BLOCK_K
        power = gl.where(block[None, :] < own[:, None], power, 0.0)
    total = gl.sum(power, 1)
    largest = (ZERO - shift) / STEPS
    steps = steps.to(gl.int32, bitcast=True).to(gl.int16)
    rows = sizes[1] - sizes[0]
    gl.store(to + at.to(gl.int64)[:, None] * stride + block[None, :], steps, mask=(at < kept)[:, None])
    gl.store(totals + at, largest, mask=at < kept)
    gl.store(totals + rows + at, total, mask=at < kept)


@gluon.jit
def _take(queries, full, keys, c: gl.constexpr, g):
    """Wait for a consumer's next rows, and load them."""
    slot = c * QUERY_STAGES + g % QUERY_STAGES
    mbarrier.wait(full.index(slot), (g // QUERY_STAGES) & 1)
    return queries.index(slot).reshape([ROWS, queries.shape[3]]).load(_queries_layout(keys.dtype))


@gluon.jit
def _consume_within(
    target, to, to_totals, within, c: gl.constexpr, g, SUBS: gl.constexpr, STEPS: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Score a consumer's rows that end within an item's blocks; return `g` after them."""
    _scores, _totals, stride, scale, _heads, sizes, rings = target
    queries, query_full, query_empty, keys, _key_full, _key_empty = rings
    start, _stop, past, _across, _rows = sizes
    begin, end_of_rows, bottom, left, first = within
    STRIDE: gl.constexpr = queries.shape[0] // QUERY_STAGES * ROWS
    for row in range(begin, end_of_rows, STRIDE):
        query = _take(queries, query_full, keys, c, g)
        end = past + (row + 1) * BLOCK_Q - 1
        best = _seen_scores(query, keys, first, end - left * BLOCK_K, SUBS, BLOCK_Q, BLOCK_K)
        mbarrier.arrive(query_empty.index(c * QUERY_STAGES + g % QUERY_STAGES), count=1)
        where = (row - start, bottom - start, left)
        _store(best, to, to_totals, where, end, sizes, stride, scale, False, STEPS, BLOCK_Q, BLOCK_K)
        g += 1
    return g


@gluon.jit
def _consume(
    target, c: gl.constexpr, SUBS: gl.constexpr, STEPS: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Score every second tile of rows of all items."""
    scores, totals, stride, scale, heads, sizes, rings = target
    queries, query_full, query_empty, keys, key_full, key_empty = rings
    start, stop, past, across, _rows = sizes
    CONSUMERS: gl.constexpr = queries.shape[0] // QUERY_STAGES
    PARTS: gl.constexpr = SUBS // keys.shape[1]
    KEY_STAGES: gl.constexpr = key_full.shape[0]
    STRIDE: gl.constexpr = CONSUMERS * ROWS
    g = 0
    k = 0
    item = gl.program_id(0)
    strip, before, more = _find(item, gl.to_tensor(0), gl.to_tensor(0), heads, sizes, BLOCK_Q, BLOCK_K)
    while more:
        head, tile, top, bottom = _place(item - before, strip, heads, sizes, BLOCK_Q, BLOCK_K)
        left = tile * BLOCKS
        to = scores + head.to(gl.int64) * (stop - start) * stride
        to_totals = totals + (head * across + tile).to(gl.int64) * 2 * (stop - start)
        mbarrier.wait(key_full.index(k % KEY_STAGES), (k // KEY_STAGES) & 1)
        first = k % KEY_STAGES * PARTS
        # Rows that end within the tile come first, then those behind it.
        begin = top + c * ROWS
        behind = gl.cdiv((left + BLOCKS) * BLOCK_K + 1 - past, BLOCK_Q) - 1
        middle = begin + gl.maximum(gl.cdiv(behind - begin, STRIDE), 0) * STRIDE
        within = (begin, gl.minimum(middle, bottom), bottom, left, first)
        g = _consume_within(target, to, to_totals, within, c, g, SUBS, STEPS, BLOCK_Q, BLOCK_K)
        best = _nothing(keys)
        # Before the first tile there is none to store: no row is before this.
        kept = gl.to_tensor(-(2**30))
        for row in range(middle, bottom, STRIDE):
            query = _take(queries, query_full, keys, c, g)
            if best.dtype == gl.float16:
                best = _scores(query, keys, first, PARTS)
            else:
                where = (row - STRIDE - start, kept, left)
                pending = (to, to_totals, where, sizes, stride, scale)
                best = _scores_and_store(query, keys, first, best, pending, PARTS, STEPS)
            # Only now: behind a product of them the copy into registers has happened.
            mbarrier.arrive(query_empty.index(c * QUERY_STAGES + g % QUERY_STAGES), count=1)
            kept = bottom - start
            if best.dtype == gl.float16:
                where = (row - start, kept, left)
                _store(best, to, to_totals, where, 0, sizes, stride, scale, True, STEPS, 1, 1)
            g += 1
        if best.dtype == gl.float32:
            last = middle + (gl.cdiv(bottom - middle, STRIDE) - 1) * STRIDE - start
            _store(best, to, to_totals, (last, kept, left), 0, sizes, stride, scale, True, STEPS, 1, 1)
        mbarrier.arrive(key_empty.index(k % KEY_STAGES), count=1)
        k += 1
        item += gl.num_programs(0)
        strip, before, more = _find(item, strip, before, heads, sizes, BLOCK_Q, BLOCK_K)


# Sizes change with every prompt; compiling anew for round ones would gain nothing.
@gluon.jit(do_not_specialize=["heads", "group", "start", "stop", "past", "across", "rows"])
def score(
    queries,
    keys,
    scores,
    totals,
    heads,
    group,
    start,
    stop,
    past,
    across,
    rows,
    stride,
    scale,
    SUBS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    STEPS: gl.constexpr,
):
    """Write the scores of rows `start` to `stop`; launched with a program per multiprocessor.

    A row is a query summary of BLOCK_Q tokens, the first at position `past`; a KV block has BLOCK_K tokens
    and SUBS summaries. `queries` and `keys` describe ``[B, H, all rows, 64]`` and ``[B, H / group, Nk * SUBS,
    64]`` of 16 or of 8 bits; `heads` are ``B * H``. `totals`, fp32 ``[heads, across, 2, stop - start]``, get
    for each tile of 32 blocks, of which there are `across`, a row's largest score, times `scale` above 0 and
    to the base of 2, and the sum of exponentials of differences from it before the row's own block. `scores`,
    int16 ``[heads, stop - start, stride]``, get the difference of each block's largest score from that, STEPS
    per unit; of the block that a row ends in only summaries count that begin by its end. A strip has `rows`
    of them, a multiple of 64.
    """
    E: gl.constexpr = queries.block_shape[2]
    query_tiles = gl.allocate_shared_memory(
        queries.dtype, [CONSUMERS * QUERY_STAGES, 1, ROWS, E], queries.layout
    )
    # Places side by side, as products take them.
    key_tiles = gl.allocate_shared_memory(
        keys.dtype, [KEY_STAGES * (SUBS // PLACES), PLACES, 4, 4, 2, E], keys.layout
    )
    query_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS * QUERY_STAGES, 1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(
        gl.int64, [CONSUMERS * QUERY_STAGES, 1], mbarrier.MBarrierLayout()
    )
    key_full = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS * QUERY_STAGES):
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_empty.index(i), count=1)
    for i in gl.static_range(KEY_STAGES):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(key_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    sizes = (start, stop, past, across, rows)
    rings = (query_tiles, query_full, query_empty, key_tiles, key_full, key_empty)
    target = (scores, totals, stride, scale, heads, sizes, rings)
    of_keys = (keys, key_tiles, key_full, key_empty, heads, group, sizes)
    of_queries = (queries, query_tiles, query_full, query_empty, heads, sizes)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (target, 0, SUBS, STEPS, BLOCK_Q, BLOCK_K)),
                (_consume, (target, 1, SUBS, STEPS, BLOCK_Q, BLOCK_K)),
                (_bring_keys, (of_keys, SUBS, BLOCK_Q, BLOCK_K)),
                (_bring_queries, (of_queries, BLOCK_Q, BLOCK_K)),
            ],
            [4, 1, 1],
            [TWO_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (target, 0, SUBS, STEPS, BLOCK_Q, BLOCK_K)),
                (_consume, (target, 1, SUBS, STEPS, BLOCK_Q, BLOCK_K)),
                (_consume, (target, 2, SUBS, STEPS, BLOCK_Q, BLOCK_K)),
                (_bring_keys, (of_keys, SUBS, BLOCK_Q, BLOCK_K)),
                (_bring_queries, (of_queries, BLOCK_Q, BLOCK_K)),
            ],
            [4, 4, 1, 1],
            [THREE_REGISTERS, THREE_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
