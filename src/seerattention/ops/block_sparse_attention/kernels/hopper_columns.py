"""Gradients of keys and values on Hopper, in Gluon: the columns of `backward_columns.py` by warp roles.

A multiprocessor runs one persistent program of two consumers (a warpgroup each) and their producers (a warp
each). A producer takes the next part of a column of 64 keys from the plan, copies keys and values to where
they stay, walks the column of the selection's bits and copies the queries and gradients of every tile that
reads these keys into a ring by TMA, with the two numbers that each query has. Its consumer multiplies keys
by queries, so that probabilities and their gradients lie as the second products want them on the left. While
one consumer works on probabilities, the other one's products keep the tensor cores busy.

`c` numbers a consumer and its ring, `g` counts uses of a ring's slots since the start.
"""

# Gluon is a language of its own: a type checker of Python does not know it.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seerattention.ops.block_sparse_attention.kernels.hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    descriptor,
    load_tile,
)

#: How a warpgroup holds 64 x 64 scores.
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))

#: How 64 numbers of queries lie in shared memory.
LINE = gl.NVMMASharedLayout(0, 32, 1)

LOG2E = gl.constexpr(1.4426950408889634)


def describe(tiles: Iterable[Tensor], numbers: Iterable[Tensor]) -> list[Any]:
    """Describe tiles of 64 tokens of ``[B, H, T, D]``, and 64 numbers of contiguous fp32 tensors."""
    lines = (TensorDescriptor(x, [x.numel()], [1], [64], LINE) for x in numbers)
    return [*(descriptor(x, 64) for x in tiles), *lines]


@gluon.jit
def _slot(g, c: gl.constexpr, STAGES: gl.constexpr):
    return c * STAGES + g % STAGES


@gluon.jit
def _wait(channel, g, c: gl.constexpr, STAGES: gl.constexpr):
    mbarrier.wait(channel[3].index(_slot(g, c, STAGES)), (g // STAGES) & 1)


@gluon.jit
def _free(channel, g, c: gl.constexpr, STAGES: gl.constexpr):
    mbarrier.arrive(channel[4].index(_slot(g, c, STAGES)), count=1)


@gluon.jit
def _wait_free(channel, g, c: gl.constexpr, STAGES: gl.constexpr):
    mbarrier.wait(channel[4].index(_slot(g, c, STAGES)), ((g // STAGES) & 1) ^ 1)


@gluon.jit
def _line(g, c: gl.constexpr, STAGES: gl.constexpr):
    """Return where a step's shifts lie, right before its deltas: room for half as many steps as slots."""
    PAIRS: gl.constexpr = STAGES // 2
    return (c * PAIRS + (g >> 1) % PAIRS) * 2


@gluon.jit
def _put(desc, numbers: gl.constexpr, b, head, first, channel, g, c: gl.constexpr, STAGES: gl.constexpr):
    """Copy 64 tokens from `first` on into the ring's next slot; `numbers` bytes come with them."""
    D: gl.constexpr = desc.block_shape[3]
    slot = _slot(g, c, STAGES)
    full = channel[3].index(slot)
    mbarrier.expect(full, 64 * D * 2 + numbers)
    load_tile(desc, [b, head, first, 0], full, channel[0].index(slot))
    return full


@gluon.jit
def _write(note, value):
    zero = gl.zeros([1], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    note.store(zero + value)


@gluon.jit
def _read(note):
    return gl.sum(note.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _place(unit, sizes, PARTS: gl.constexpr):
    """Return a unit's batch entry, KV head, KV block and first key."""
    kv_heads, _queries, keys = sizes
    columns = gl.cdiv(keys, PARTS * 64)
    column = unit // PARTS
    block = column % columns
    pair = column // columns
    return pair // kv_heads, pair % kv_heads, block, (block * PARTS + unit % PARTS) * 64


@gluon.jit
def _words(bits, start, span, first_head, stride_h, stride_row, GROUP: gl.constexpr, SHARED: gl.constexpr):
    """Load a word of 32 (head of the group, row) pairs each."""
    pair = start + gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    row = pair % span
    head = (first_head + pair // span) // SHARED
    return gl.load(bits + head * stride_h + row * stride_row, mask=pair < GROUP * span, other=0)


@gluon.jit
def _produce(  # noqa: PLR0915
    source,
    c: gl.constexpr,
    GROUP: gl.constexpr,
    SHARED: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Feed a ring: per part of a column the tiles of queries and of gradients that read it."""
    descs, lists, work, sizes, channel = source
    qd, gd, kd, vd, shift_desc, delta_desc = descs
    bits, stride_b, stride_h, stride_row = lists
    counter, plan, units = work
    kv_heads, queries, keys = sizes
    ring, numbers, notes, full, empty = channel
    D: gl.constexpr = qd.block_shape[3]
    # What stays is behind the ring's slots.
    own: gl.constexpr = 2 * STAGES + c
    planned = gl.load(plan + 3 * units)
    limit = gl.load(plan + 3 * units + 1)
    g = 0
    turn = 1
    item = gl.atomic_add(counter, 1)
    while item < planned:
        unit = gl.load(plan + 4 * units + 2 + item)
        b, kv_head, block, first_key = _place(unit, sizes, PARTS)
        part = item - gl.load(plan + unit)
        skip = part * limit
        left = gl.minimum(gl.load(plan + 3 * units + 2 + unit) - skip, limit)
        place = gl.where(gl.load(plan + units + unit) > 1, gl.load(plan + 2 * units + unit) + part, -1)
        item = gl.atomic_add(counter, 1)
        mbarrier.wait(empty.index(own), turn)
        turn ^= 1
        _write(notes.index(2 * STAGES + 3 * c), unit)
        _write(notes.index(2 * STAGES + 3 * c + 1), left)
        _write(notes.index(2 * STAGES + 3 * c + 2), place)
        mbarrier.expect(full.index(own), 2 * 64 * D * 2)
        load_tile(kd, [b, kv_head, first_key, 0], full.index(own), ring.index(2 * STAGES + 2 * c))
        load_tile(vd, [b, kv_head, first_key, 0], full.index(own), ring.index(2 * STAGES + 2 * c + 1))

        # Earlier rows lie before the block's first key, even if a selection holds them.
        first_row = gl.maximum(block * (PARTS * 64) - (keys - queries), 0) // BLOCK_Q
        span = gl.cdiv(queries, BLOCK_Q) - first_row
        column = bits + (b * stride_b + first_row * stride_row + block // 32)
        first_head = kv_head * GROUP
        start = 0
        words = _words(column, start, span, first_head, stride_h, stride_row, GROUP, SHARED)
        while left > 0:
            lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
            chosen = gl.sum(((words >> (block % 32)) & 1) << lane, 0)
            words = _words(column, start + 32, span, first_head, stride_h, stride_row, GROUP, SHARED)
            count = libdevice.popc(chosen)
            if count <= skip:
                skip -= count
                chosen = 0
            while (chosen != 0) & (left > 0):
                bit = libdevice.ffs(chosen) - 1
                chosen &= chosen - 1
                if skip > 0:
                    skip -= 1
                else:
                    left -= 1
                    head = first_head + (start + bit) // span
                    first = (first_row + (start + bit) % span) * BLOCK_Q
                    end = gl.minimum(first + BLOCK_Q, queries)
                    while first < end:
                        at = (b * (kv_heads * GROUP) + head) * (gl.cdiv(queries, 128) * 128) + first
                        _wait_free(channel, g, c, STAGES)
                        # Where queries lie behind the first key, and whether another tile follows.
                        ahead = keys - queries + first - first_key
                        more = gl.where((left > 0) | (first + 64 < end), 1, 0)
                        _write(channel[2].index(_slot(g, c, STAGES)), ahead * 2 + more)
                        _put(qd, 0, b, head, first, channel, g, c, STAGES)
                        _wait_free(channel, g + 1, c, STAGES)
                        landed = _put(gd, 2 * 64 * 4, b, head, first, channel, g + 1, c, STAGES)
                        # This slot is free, so the step whose numbers these replace has read them.
                        line = _line(g, c, STAGES)
                        load_tile(shift_desc, [at], landed, numbers.index(line))
                        load_tile(delta_desc, [at], landed, numbers.index(line + 1))
                        g += 2
                        first += 64
            start += 32
    mbarrier.wait(empty.index(own), turn)
    _write(notes.index(2 * STAGES + 3 * c), -1)
    mbarrier.arrive(full.index(own), count=1)


@gluon.jit
def _store(base, x, line, stride, inside):
    """Write 64 rows as they lie in registers."""
    layout: gl.constexpr = x.type.layout
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    where = base + line + (rows.to(gl.int64) * stride)[:, None] + columns[None, :]
    gl.store(where, x.to(base.dtype.element_ty), mask=(rows < inside)[:, None])


@gluon.jit
def _probabilities(s, shift, ahead, scale):
    """Return a tile's probabilities, keys along the rows."""
    layout: gl.constexpr = s.type.layout
    p = gl.exp2(s * scale - shift[None, :])
    if ahead < 63:
        key = gl.arange(0, 64, gl.SliceLayout(1, layout))
        query = ahead + gl.arange(0, 64, gl.SliceLayout(0, layout))
        p = gl.where(key[:, None] > query[None, :], 0.0, p)
    return p


@gluon.jit
def _multiply(left, tile):
    """Start the product of 64 keys or values and a tile of the ring."""
    zero = gl.zeros([64, 64], gl.float32, SCORES)
    return warpgroup_mma(left, tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _step(k, v, dk, dv, channel, g, scale, c: gl.constexpr, STAGES: gl.constexpr):
    """Add a tile of queries and of gradients; return whether another one follows too."""
    D: gl.constexpr = dk.shape[1]
    dtype: gl.constexpr = channel[0].dtype
    left: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    across: gl.constexpr = gl.SliceLayout(0, SCORES)
    one = _slot(g, c, STAGES)
    other = _slot(g + 1, c, STAGES)
    _wait(channel, g, c, STAGES)
    q = channel[0].index(one).reshape([64, D])
    s = _multiply(k, q)
    _wait(channel, g + 1, c, STAGES)
    grad = channel[0].index(other).reshape([64, D])
    dp = _multiply(v, grad)
    note = _read(channel[2].index(one))
    line = _line(g, c, STAGES)
    shift = channel[1].index(line).load(across)
    s = warpgroup_mma_wait(1, deps=[s])
    p = _probabilities(s, shift, note >> 1, scale)
    dv = warpgroup_mma(gl.convert_layout(p.to(dtype), left), grad, dv, is_async=True)
    delta = channel[1].index(line + 1).load(across)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - delta[None, :])
    dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), left), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv])
    _free(channel, g + 1, c, STAGES)
    dk = warpgroup_mma_wait(0, deps=[dk])
    _free(channel, g, c, STAGES)
    return dk, dv, note & 1


@gluon.jit
def _consume(target, c: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    """Compute the gradients of the parts that a ring brings."""
    dk_ptr, dv_ptr, strides, partial, sizes, scale, channel = target
    ring, _numbers, notes, full, empty = channel
    own: gl.constexpr = 2 * STAGES + c
    keys = sizes[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    k = ring.index(2 * STAGES + 2 * c).reshape([64, D])
    v = ring.index(2 * STAGES + 2 * c + 1).reshape([64, D])
    g = 0
    turn = 0
    mbarrier.wait(full.index(own), turn)
    unit = _read(notes.index(2 * STAGES + 3 * c))
    while unit >= 0:
        more = _read(notes.index(2 * STAGES + 3 * c + 1))
        place = _read(notes.index(2 * STAGES + 3 * c + 2))
        dk = gl.zeros([64, D], gl.float32, layout)
        dv = gl.zeros([64, D], gl.float32, layout)
        while more > 0:
            dk, dv, more = _step(k, v, dk, dv, channel, g, scale * LOG2E, c, STAGES)
            g += 2
        mbarrier.arrive(empty.index(own), count=1)
        dk = dk * scale
        if place < 0:
            b, kv_head, _, first_key = _place(unit, sizes, PARTS)
            inside = keys - first_key
            line = b.to(gl.int64) * strides[0] + kv_head.to(gl.int64) * strides[1]
            line += first_key.to(gl.int64) * strides[2]
            _store(dk_ptr, dk, line, strides[2], inside)
            _store(dv_ptr, dv, line, strides[2], inside)
        else:
            line = place.to(gl.int64) * (2 * 64 * D)
            _store(partial, dk, line, D, 64)
            _store(partial, dv, line + 64 * D, D, 64)
        turn ^= 1
        mbarrier.wait(full.index(own), turn)
        unit = _read(notes.index(2 * STAGES + 3 * c))


# Sizes change with every prompt; compiling anew for round ones would gain nothing.
@gluon.jit(
    do_not_specialize=[
        *("stride_b", "stride_h", "stride_row", "units"),
        *("kv_heads", "queries", "keys"),
    ]
)
def attend_back(
    qd,
    gd,
    kd,
    vd,
    shift_desc,
    delta_desc,
    dk,
    dv,
    stride_dk_b,
    stride_dk_h,
    stride_dk_row,
    partial,
    bits,
    stride_b,
    stride_h,
    stride_row,
    counter,
    plan,
    units,
    kv_heads,
    queries,
    keys,
    scale,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    SHARED: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute the gradients of all columns' parts; launched with one program per multiprocessor.

    `qd` and `gd` describe q and the output's gradient ``[B, Hq, Tq, D]``, `kd` and `vd` k and v
    ``[B, Hk, Tk, D]``, `shift_desc` and `delta_desc` pieces of fp32 ``[B, Hq, padded]``. `dk` and `dv` are
    shaped as k, with the strides given. `counter` is zero and counts the parts taken. `plan` is that of
    `backward.split_columns` for `units` columns of 64 keys, `partial` is where parts of split columns go.
    A KV block has PARTS tiles of 64 keys, GROUP query heads share a KV head and SHARED query heads a row of
    `bits`.
    """
    # Keys and values of the two consumers lie behind their rings, and so do their notes and barriers.
    ring = gl.allocate_shared_memory(qd.dtype, [2 * STAGES + 4, 1, 1, 64, D], qd.layout)
    numbers = gl.allocate_shared_memory(gl.float32, [4 * (STAGES // 2), 64], shift_desc.layout)
    note_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    notes = gl.allocate_shared_memory(gl.int32, [2 * STAGES + 6, 1], note_layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES + 2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    sizes = (kv_heads, queries, keys)
    lists = (bits, stride_b, stride_h, stride_row)
    work = (counter, plan, units)
    channel = (ring, numbers, notes, full, empty)
    source = ((qd, gd, kd, vd, shift_desc, delta_desc), lists, work, sizes, channel)
    strides = (stride_dk_b, stride_dk_h, stride_dk_row)
    target = (dk, dv, strides, partial, sizes, scale, channel)
    gl.warp_specialize(
        [
            (_consume, (target, 0, D, PARTS, STAGES)),
            (_consume, (target, 1, D, PARTS, STAGES)),
            (_produce, (source, 0, GROUP, SHARED, BLOCK_Q, PARTS, STAGES)),
            (_produce, (source, 1, GROUP, SHARED, BLOCK_Q, PARTS, STAGES)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
