"""Summaries in Gluon, Triton's language with explicit layouts, barriers and warp roles.

A multiprocessor runs one persistent program of two consumers (a warpgroup each) and two producers (a warp
each). An item is 64 blocks of a head. TMA copies the tokens at one place within all the blocks as one tile:
pools are then maxima and sums of whole tiles, number by number, in the registers from which the tensor cores
take the left side of a product. The right side is the head's matrix, which stays in shared memory while the
head's items pass. The consumers take items in turn; a program's items are a head's, and then the next one's.

A part is what a slot of the ring holds, 64 numbers of the tokens at up to four places. `g` counts parts
since the start. A barrier's wait tells two fillings of a slot apart, not three: a consumer begins an item
only once the other has seen all parts of the one before. A short last block has no place in a tile: one
consumer summarises it on its own.
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

#: Blocks of an item, the rows of a warpgroup's wgmma, and numbers of a token in a part: 128 bytes.
ROWS, NUMBERS = gl.constexpr(64), gl.constexpr(64)

#: Places within a block in a part, at most.
PLACES = gl.constexpr(4)

#: Registers per thread: two consumers of 128 threads and the producers' warpgroup share 65,536.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)

#: How parts lie in shared memory.
TOKENS = gl.NVMMASharedLayout(128, 16, 5)

# The copy is called async_load since triton 3.7.
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def describe_tokens(x: Tensor, size: int) -> Any:
    """Describe ``[B, H, T, D]`` for TMA copies of places within 64 blocks of ``size`` tokens.

    The tokens of a short last block are left out, and like all past the end read as zero; if it is the only
    one, its tokens are there.
    """
    batch, heads, tokens, width = x.shape
    # A dimension of one element may have any stride, TMA wants a multiple of 16 bytes.
    b, h, t = (s if n > 1 else width for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))
    shape = [batch, heads, min(size, tokens), max(1, tokens // size), width]
    box = [1, 1, min(size, PLACES.value), ROWS.value, NUMBERS.value]
    return TensorDescriptor(x, shape, [b, h, t, size * t, 1], box, TOKENS)


def describe_matrices(weight: Tensor) -> Any:
    """Describe contiguous ``[H, rows, E]`` for TMA copies of 64 rows."""
    heads, rows, dim = weight.shape
    layout = gl.NVMMASharedLayout(min(128, 2 * dim), 16, 2)
    return TensorDescriptor(weight, [heads * rows, dim], [dim, 1], [NUMBERS.value, dim], layout)


@gluon.constexpr_function
def _product(dim):
    """How a warpgroup holds a product of 64 rows, ``dim`` numbers each."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])


@gluon.constexpr_function
def _pooled(dim):
    """How it holds pools: as the left side of that product."""
    return gl.DotOperandLayout(0, _product(dim), 2)


@gluon.constexpr_function
def _half(dim):
    """How it stores half of each summary: four threads a row, what each of them has is contiguous."""
    wide = dim // 8
    columns = [1 << i for i in range(wide.bit_length() - 1)]
    near, far = [c for c in columns if c < 8], [c for c in columns if c >= 8]
    lane = min(wide, 8)
    registers = [[0, c] for c in near] + [[8, 0]] + [[0, c * 4] for c in far]
    lanes = [[0, lane], [0, 2 * lane], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, dim // 2])


@gluon.constexpr_function
def _matrix(dim):
    """How it holds 64 rows of a matrix whose products with one summary it adds up."""
    across = dim // 8
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def _range(items):
    """Return a program's first item and the one after its last."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    each, more = items // programs, items % programs
    first = program * each + gl.minimum(program, more)
    return first, first + each + (program < more).to(gl.int32)


@gluon.jit
def _bring_tokens(
    tokens, parts, full, empty, sizes, SIZE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr
):
    """Copy the parts of all items: numbers by numbers, the places of a block behind one another."""
    items, tiles, heads = sizes[0], sizes[1], sizes[2]
    HELD: gl.constexpr = tokens.block_shape[2]
    first, last = _range(items)
    g = 0
    for item in range(first, last):
        row = item // tiles
        for numbers in gl.static_range(D // NUMBERS):
            for place in gl.static_range(SIZE // HELD):
                slot = g % STAGES
                mbarrier.wait(empty.index(slot), ((g // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(slot), HELD * ROWS * NUMBERS * 2)
                at = [row // heads, row % heads, place * HELD, item % tiles * ROWS, numbers * NUMBERS]
                _load_tile(tokens, at, full.index(slot), parts.index(slot))
                g += 1


@gluon.jit
def _bring_matrices(matrices, held, full, empty, sizes):
    """Copy the matrix of each head that a program has items of, once the one before is no longer needed."""
    items, tiles, heads = sizes[0], sizes[1], sizes[2]
    COUNT: gl.constexpr = held.shape[0]
    E: gl.constexpr = held.shape[2]
    first, last = _range(items)
    start = first // tiles
    for row in range(start, gl.cdiv(last, tiles)):
        mbarrier.wait(empty, ((row - start) & 1) ^ 1)
        mbarrier.expect(full, COUNT * NUMBERS * E * 2)
        for number in gl.static_range(COUNT):
            at = [(row % heads * COUNT + number) * NUMBERS, 0]
            _load_tile(matrices, at, full, held.index(number))


@gluon.constexpr_function
def _of_pairs(operation, dtype):
    """Return PTX for two numbers at a time: the language takes maxima of bfloat16 in fp32."""
    return f"{operation}.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'} $0, $1, $2;"


@gluon.jit
def _pick(operation: gl.constexpr, a, b):
    """Return the ``max`` or the ``min`` of two tiles, number by number."""
    PTX: gl.constexpr = _of_pairs(operation, a.dtype)
    return gl.inline_asm_elementwise(PTX, "=r,r,r", [a, b], a.dtype, is_pure=True, pack=2)


@gluon.jit
def _pools(parts, full, other, g, LAST: gl.constexpr, SIZE: gl.constexpr, E: gl.constexpr):
    """Return maxima, minima and means ``[64, 64]`` of the parts from `g` on, an item's LAST or not."""
    STAGES: gl.constexpr = parts.shape[0]
    HELD: gl.constexpr = parts.shape[3]
    for part in gl.static_range(SIZE // HELD):
        slot = (g + part) % STAGES
        mbarrier.wait(full.index(slot), ((g + part) // STAGES) & 1)
        if LAST and part == SIZE // HELD - 1:
            mbarrier.arrive(other, count=1)
        tiles = parts.index(slot).reshape([HELD * ROWS, NUMBERS])
        for place in gl.static_range(HELD):
            number = tiles.slice(place * ROWS, ROWS, 0).load(_pooled(E))
            if part + place == 0:
                high = number
                low = number
                total = number.to(gl.float32)
            else:
                high = _pick("max", high, number)
                low = _pick("min", low, number)
                total += number.to(gl.float32)
    return high, low, (total * (1.0 / SIZE)).to(parts.dtype)


@gluon.jit
def _project(parts, full, empty, held, other, g, SIZE: gl.constexpr, D: gl.constexpr, POOLS: gl.constexpr):
    """Return an item's product with the head's matrix, fp32 ``[64, E]``, and give its slots back.

    The `other` consumer's turn comes with the last part.
    """
    E: gl.constexpr = held.shape[2]
    STAGES: gl.constexpr = parts.shape[0]
    COUNT: gl.constexpr = SIZE // parts.shape[3]
    out = gl.zeros([ROWS, E], gl.float32, _product(E))
    for numbers in gl.static_range(D // NUMBERS):
        pools = _pools(parts, full, other, g + numbers * COUNT, numbers + 1 == D // NUMBERS, SIZE, E)
        for kind in gl.static_range(3):
            if POOLS[kind] >= 0:
                matrix = held.index(POOLS[kind] * (D // NUMBERS) + numbers)
                out = warpgroup_mma(pools[kind], matrix, out, is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])
        # Only now: behind products of them the copies into registers have happened.
        for part in gl.static_range(COUNT):
            mbarrier.arrive(empty.index((g + numbers * COUNT + part) % STAGES), count=1)
    return out


@gluon.jit
def _project_one(x, stride, count, held, D: gl.constexpr, POOLS: gl.constexpr):
    """Return the product of one block of `count` tokens at `x` with the head's matrix, fp32 ``[E]``."""
    E: gl.constexpr = held.shape[2]
    LAYOUT: gl.constexpr = _matrix(E)
    d = gl.arange(0, NUMBERS, gl.SliceLayout(1, LAYOUT))
    out = gl.zeros([NUMBERS, E], gl.float32, LAYOUT)
    for numbers in gl.static_range(D // NUMBERS):
        high = gl.full([NUMBERS], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
        low = -high
        total = gl.zeros([NUMBERS], gl.float32, gl.SliceLayout(1, LAYOUT))
        for token in range(count):
            number = gl.load(x + token.to(gl.int64) * stride + numbers * NUMBERS + d).to(gl.float32)
            high = gl.maximum(high, number)
            low = gl.minimum(low, number)
            total += number
        pools = (high, low, total / count.to(gl.float32))
        for kind in gl.static_range(3):
            if POOLS[kind] >= 0:
                matrix = held.index(POOLS[kind] * (D // NUMBERS) + numbers).load(LAYOUT)
                pool = pools[kind].to(held.dtype).to(gl.float32)
                out += pool[:, None] * matrix.to(gl.float32)
    return gl.sum(out, 0)


@gluon.jit
def _angles(turns, at, inside, E: gl.constexpr):
    """Load cosines and sines of summaries, of both halves each: those of the first begin at `at`."""
    cos, sin = turns
    if cos is None:
        loaded = (at, at, at, at)
    else:
        cos_a = gl.load(cos + at, mask=inside, other=0.0)
        cos_b = gl.load(cos + at + E // 2, mask=inside, other=0.0)
        sin_a = gl.load(sin + at, mask=inside, other=0.0)
        sin_b = gl.load(sin + at + E // 2, mask=inside, other=0.0)
        loaded = (cos_a, cos_b, sin_a, sin_b)
    return loaded


@gluon.jit
def _rounded(number, out, LIKE: gl.constexpr):
    """Round numbers to LIKE and then to the dtype of `out`; of 8 bits, its largest stands for all beyond."""
    number = number.to(LIKE)
    if out.dtype.element_ty.primitive_bitwidth == 8:
        number = gl.minimum(gl.maximum(number.to(gl.float32), -448.0), 448.0)
    return number.to(out.dtype.element_ty)


@gluon.jit
def _finish(a, b, angles, out, inside, ROTATES: gl.constexpr, E: gl.constexpr, LIKE: gl.constexpr):
    """Rotate summaries in two halves and store them, the first half at `out`."""
    if ROTATES:
        cos_a, cos_b, sin_a, sin_b = angles
        turned = a * cos_a - b * sin_a
        b = b * cos_b + a * sin_b
        a = turned
    gl.store(out, _rounded(a, out, LIKE), mask=inside)
    gl.store(out + E // 2, _rounded(b, out, LIKE), mask=inside)


@gluon.jit
def _summarise_last(x, stride, count, held, turns, at, out, D: gl.constexpr, POOLS: gl.constexpr):
    """Summarise the short block of `count` tokens at `x`; its angles are at `at`."""
    E: gl.constexpr = held.shape[2]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, _half(E))
    e = gl.arange(0, E // 2, COLUMNS)
    # In this layout, too, a thread has an entry of both halves.
    product = gl.convert_layout(
        _project_one(x, stride, count, held, D, POOLS), gl.SliceLayout(0, _product(E))
    )
    a, b = product.reshape([2, E // 2]).permute((1, 0)).split()
    a, b = gl.convert_layout(a, COLUMNS), gl.convert_layout(b, COLUMNS)
    _finish(a, b, _angles(turns, at + e, e < E, E), out + e, e < E, turns[0] is not None, E, held.dtype)


@gluon.jit
def _consume(target, c: gl.constexpr, SIZE: gl.constexpr, D: gl.constexpr, POOLS: gl.constexpr):
    """Summarise every second item."""
    x, stride_b, stride_h, stride_t, tokens, turns, turn_rows, out, sizes, rings = target
    parts, full, empty, held, held_full, held_empty, order = rings
    items, tiles, heads = sizes
    E: gl.constexpr = held.shape[2]
    COUNT: gl.constexpr = D // NUMBERS * (SIZE // parts.shape[3])
    whole = tokens // SIZE
    blocks = gl.cdiv(tokens, SIZE)
    e = gl.arange(0, E // 2, gl.SliceLayout(0, _half(E)))[None, :]
    first, last = _range(items)
    start = first // tiles
    for head in range(start, gl.cdiv(last, tiles)):
        mbarrier.wait(held_full, (head - start) & 1)
        turn = head // heads * turn_rows
        to = out + head.to(gl.int64) * blocks * E
        # Not carried from head to head: triton 3.6 and 3.7 forget what only the bounds of a loop within read.
        begin = gl.maximum(first, head * tiles)
        for item in range(begin + ((begin - first + c) & 1), gl.minimum(last, (head + 1) * tiles), 2):
            row = (item - head * tiles) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, _half(E)))[:, None]
            # Early: they are there when the products are.
            angles = _angles(turns, (turn + row) * E + e, row < whole, E)
            mbarrier.wait(order.index(c), ((item - first) // 2 + c + 1) & 1)
            g = (item - first) * COUNT
            product = _project(parts, full, empty, held, order.index(1 - c), g, SIZE, D, POOLS)
            a, b = product.reshape([ROWS, 2, E // 2]).permute((0, 2, 1)).split()
            a, b = gl.convert_layout(a, _half(E)), gl.convert_layout(b, _half(E))
            _finish(a, b, angles, to + row * E + e, row < whole, turns[0] is not None, E, held.dtype)
            if (item + 1 == (head + 1) * tiles) & (whole < blocks):
                short = x + (head // heads).to(gl.int64) * stride_b + (head % heads).to(gl.int64) * stride_h
                short += whole.to(gl.int64) * SIZE * stride_t
                at = (turn + whole) * E
                _summarise_last(short, stride_t, tokens % SIZE, held, turns, at, to + whole * E, D, POOLS)
        mbarrier.arrive(held_empty, count=1)


# Sizes change with every prompt; compiling anew for round ones would gain nothing.
@gluon.jit(
    do_not_specialize=["stride_b", "stride_h", "stride_t", "tokens", "turn_rows", "items", "tiles", "heads"]
)
def summarise(
    parts,
    matrices,
    x,
    stride_b,
    stride_h,
    stride_t,
    tokens,
    cos,
    sin,
    turn_rows,
    out,
    items,
    tiles,
    heads,
    SIZE: gl.constexpr,
    D: gl.constexpr,
    POOLS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Summarise blocks of SIZE tokens; launched with a program per multiprocessor.

    `parts` and `matrices` describe `x`, ``[B, heads, tokens, D]`` with the strides given, and ``[heads, all
    pools' D, E]``. POOLS are the places of max, min and avg among the pools, -1 for what is not wanted.
    `cos` and `sin`, contiguous ``[B or 1, blocks, E]``, batch entries `turn_rows` rows apart, are None where
    nothing is rotated. `out` is contiguous ``[B, heads, blocks, E]``. A head has `tiles` items of 64
    blocks, all heads of all batch entries have `items`.
    """
    E: gl.constexpr = matrices.block_shape[1]
    HELD: gl.constexpr = parts.block_shape[2]
    COUNT: gl.constexpr = ((POOLS[0] >= 0) + (POOLS[1] >= 0) + (POOLS[2] >= 0)) * (D // NUMBERS)
    ring = gl.allocate_shared_memory(parts.dtype, [STAGES, 1, 1, HELD, ROWS, NUMBERS], parts.layout)
    held = gl.allocate_shared_memory(matrices.dtype, [COUNT, NUMBERS, E], matrices.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    held_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    held_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(held_full, count=1)
    mbarrier.init(held_empty, count=2)
    mbarrier.init(order.index(0), count=1)
    mbarrier.init(order.index(1), count=1)
    fence_async_shared()
    sizes = (items, tiles, heads)
    rings = (ring, full, empty, held, held_full, held_empty, order)
    target = (x, stride_b, stride_h, stride_t, tokens, (cos, sin), turn_rows, out, sizes, rings)
    gl.warp_specialize(
        [
            (_consume, (target, 0, SIZE, D, POOLS)),
            (_consume, (target, 1, SIZE, D, POOLS)),
            (_bring_tokens, (parts, ring, full, empty, sizes, SIZE, D, STAGES)),
            (_bring_matrices, (matrices, held, held_full, held_empty, sizes)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
