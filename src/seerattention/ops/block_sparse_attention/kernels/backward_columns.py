"""The backward's device functions that go column by column; `backward.py` beside this file starts them."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.block_sparse_attention.kernels.backward_rows import copy_tiles, shares
from seerattention.ops.block_sparse_attention.kernels.forward import LENGTHS
from seerattention.ops.language import add_product, jit, load_tile, score, sequence_of, store_tile, tl


@jit
def _readers(
    bits_ptr,
    list_ptr,
    stride_bits_h,
    stride_bits_row,
    kv_head,
    block,
    past,
    len_q,
    lowest,
    highest,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STORE: tl.constexpr,
):
    """Count the (query head of the group, row) pairs that read a KV block, and list a range of them.

    An entry is ``head in the group << 24 | row``. Those of rank ``lowest`` to ``highest`` are written.
    """
    CHUNK: tl.constexpr = 1024
    # Earlier rows lie before the block's first key, even if a selection holds them.
    first = tl.maximum(block * BLOCK_K - past, 0) // BLOCK_Q
    span = tl.maximum((len_q + BLOCK_Q - 1) // BLOCK_Q - first, 0)
    bits_ptr += block // 32
    count = 0
    for start in range(0, GROUP * span, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        member = pair // span
        row = first + pair % span
        head = (kv_head * GROUP + member) // SHARED
        word = tl.load(bits_ptr + head * stride_bits_h + row * stride_bits_row, mask=member < GROUP, other=0)
        chosen = (word >> (block % 32)) & 1
        if STORE:
            rank = count + tl.cumsum(chosen, 0) - 1
            wanted = (chosen != 0) & (rank >= lowest) & (rank < highest)
            tl.store(list_ptr + rank - lowest, (member << 24) | row, mask=wanted)
        count += tl.sum(chosen, 0)
    return count


@jit(*LENGTHS)
def count_kernel(
    bits_ptr,
    counts_ptr,
    starts_q_ptr,
    starts_k_ptr,
    stride_bits_b,
    stride_bits_h,
    stride_bits_row,
    columns,
    num_queries,
    num_keys,
    sequences,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Count what reads one KV block of one KV head."""
    unit = tl.program_id(0)
    kv_head = (unit // columns % KV_HEADS).to(tl.int64)
    block, first_row, _, len_q, _, len_k = sequence_of(
        unit % columns, starts_k_ptr, (starts_q_ptr, starts_k_ptr, sequences), num_queries, num_keys,
        BLOCK_K, BLOCK_Q, SEQUENCES,
    )  # fmt: skip
    bits_ptr += (unit // columns // KV_HEADS).to(tl.int64) * stride_bits_b
    bits_ptr += tl.cast(first_row, tl.int64) * stride_bits_row
    count = _readers(
        bits_ptr, counts_ptr, stride_bits_h, stride_bits_row, kv_head, block, len_k - len_q, len_q, 0, 0,
        GROUP, SHARED, BLOCK_Q, BLOCK_K, False,
    )  # fmt: skip
    tl.store(counts_ptr + unit, count)


@jit("units", "programs")
def plan_kernel(
    counts_ptr, plan_ptr, units, programs, FEWEST: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr
):
    """Make the plan of `backward.split_columns`, in one program."""
    total = tl.zeros([], dtype=tl.int64)
    for start in range(0, units, CHUNK):
        unit = start + tl.arange(0, CHUNK)
        count = tl.load(counts_ptr + unit // TILES, mask=unit < units, other=0)
        total += tl.sum(count.to(tl.int64), 0)
    limit = tl.maximum((total + 2 * programs - 1) // (2 * programs), FEWEST).to(tl.int32)
    items, slots = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
    for start in range(0, units, CHUNK):
        unit = start + tl.arange(0, CHUNK)
        inside = unit < units
        count = tl.load(counts_ptr + unit // TILES, mask=inside, other=0)
        # A column that nobody reads has one part, which writes zeros.
        parts = tl.where(inside, tl.maximum((count + limit - 1) // limit, 1), 0)
        several = tl.where(parts > 1, parts, 0)
        first = items + tl.cumsum(parts, 0) - parts
        tl.store(plan_ptr + unit, first, mask=inside)
        tl.store(plan_ptr + units + unit, parts, mask=inside)
        tl.store(plan_ptr + 2 * units + unit, slots + tl.cumsum(several, 0) - several, mask=inside)
        tl.store(plan_ptr + 3 * units + 2 + unit, count, mask=inside)
        for part in range(0, tl.max(parts, 0)):
            tl.store(plan_ptr + 4 * units + 2 + first + part, unit, mask=part < parts)
        items += tl.sum(parts, 0)
        slots += tl.sum(several, 0)
    tl.store(plan_ptr + 3 * units, items)
    tl.store(plan_ptr + 3 * units + 1, limit)


@jit(*LENGTHS, "units", "padded")
def keys_kernel(  # noqa: PLR0915
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    q_desc,
    grad_desc,
    shift_desc,
    delta_desc,
    dk_ptr,
    dv_ptr,
    shift_ptr,
    delta_ptr,
    bits_ptr,
    scratch_ptr,
    counter_ptr,
    plan_ptr,
    partial_ptr,
    starts_q_ptr,
    starts_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dk_strides,
    dv_strides,
    stride_bits_b,
    stride_bits_h,
    stride_bits_row,
    items,
    units,
    columns,
    num_queries,
    padded,
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
    SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    """Take parts of KV tiles from the plan, and write their gradients, or their share of them."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    SHARED: tl.constexpr = HEADS // BIT_HEADS
    TILES: tl.constexpr = BLOCK_K // BLOCK_N
    STEPS: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    list_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * items
    planned, limit = tl.load(plan_ptr + 3 * units), tl.load(plan_ptr + 3 * units + 1)
    item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < planned:
        unit = tl.load(plan_ptr + 4 * units + 2 + item)
        lowest = (item - tl.load(plan_ptr + unit)) * limit
        parts = tl.load(plan_ptr + units + unit)
        column, tile = unit // TILES, unit % TILES
        first_head, batch = column // columns % KV_HEADS * GROUP, column // columns // KV_HEADS
        kv_head, b = (column // columns % KV_HEADS).to(tl.int64), batch.to(tl.int64)
        block, first_row, start_q, len_q, start_k, len_k = sequence_of(
            column % columns, starts_k_ptr, (starts_q_ptr, starts_k_ptr, sequences), num_queries, num_keys,
            BLOCK_K, BLOCK_Q, SEQUENCES,
        )  # fmt: skip
        first_key = block * BLOCK_K + tile * BLOCK_N
        k_head = k_ptr + b * k_strides[0] + kv_head * k_strides[1]
        v_head = v_ptr + b * v_strides[0] + kv_head * v_strides[1]
        k = load_tile(k_head, k_strides[2], start_k + first_key, len_k - first_key, BLOCK_N, D, BLOCK_D)
        v = load_tile(v_head, v_strides[2], start_k + first_key, len_k - first_key, BLOCK_N, D, BLOCK_D)
        next_item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
        bits_head = bits_ptr + b * stride_bits_b + tl.cast(first_row, tl.int64) * stride_bits_row
        # Nobody may still read the list of the item before.
        tl.debug_barrier()
        count = _readers(
            bits_head, list_ptr, stride_bits_h, stride_bits_row, kv_head, block, len_k - len_q, len_q, lowest,
            lowest + limit, GROUP, SHARED, BLOCK_Q, BLOCK_K, True,
        )  # fmt: skip
        tl.debug_barrier()
        count = tl.minimum(count - lowest, limit)

        places, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        q_group = q_ptr + b * q_strides[0] + kv_head * GROUP * q_strides[1]
        grad_group = grad_ptr + b * grad_strides[0] + kv_head * GROUP * grad_strides[1]
        shift_group = shift_ptr + (b * HEADS + first_head) * padded + start_q
        delta_group = delta_ptr + (b * HEADS + first_head) * padded + start_q
        # The list is read one step ahead, so that the loads of queries never wait for it.
        entry = tl.load(list_ptr)
        for i in tl.range(0, count * STEPS, num_stages=STAGES):
            member, row = entry >> 24, entry & 0xFFFFFF
            first = row * BLOCK_Q + i % STEPS * BLOCK_M
            inside = tl.minimum(tl.minimum(first + BLOCK_M, (row + 1) * BLOCK_Q), len_q) - first
            entry = tl.load(list_ptr + (i + 1) // STEPS)
            if TMA:
                q, grad = copy_tiles(
                    q_desc, grad_desc, batch, first_head + member, start_q + first, BLOCK_M, BLOCK_D
                )
            else:
                q_head = q_group + member.to(tl.int64) * q_strides[1]
                grad_head = grad_group + member.to(tl.int64) * grad_strides[1]
                q = load_tile(q_head, q_strides[2], start_q + first, inside, BLOCK_M, D, BLOCK_D)
                grad = load_tile(grad_head, grad_strides[2], start_q + first, inside, BLOCK_M, D, BLOCK_D)
            at = member * padded + first + places
            if TMA:
                place = (batch * HEADS + first_head + member) * padded + first
                shift = shift_desc.load([place])
            else:
                shift = tl.load(shift_group + at, mask=places < inside, other=float("inf"))
            if q.dtype == tl.float32 and BLOCK_D > 64:
                # Operands of fp32 products lie in registers, where these two would stay: they are read
                # again, from a place that the compiler does not know to be the same.
                again = start_k + first_key + (row >> 24)
                k = load_tile(k_head, k_strides[2], again, len_k - first_key, BLOCK_N, D, BLOCK_D)
                v = load_tile(v_head, v_strides[2], again, len_k - first_key, BLOCK_N, D, BLOCK_D)
            # Keys lie along the rows: the second products then take these as they leave the first.
            p, slope = shares(
                score(k, tl.trans(q), scale), shift[None, :], scale, softcap, SOFTCAP, q.dtype == tl.float32
            )
            first_query = len_k - len_q + first
            if first_key + BLOCK_N > first_query + 1:
                p = tl.where((first_key + keys)[:, None] > (first_query + places)[None, :], 0.0, p)
            dv = add_product(dv, p, grad, scale)
            if TMA:
                delta = delta_desc.load([place])
            else:
                delta = tl.load(delta_group + at, mask=places < inside, other=0.0)
            ds = p * (score(v, tl.trans(grad), scale) - delta[None, :]) * slope
            dk = add_product(dk, ds, q, scale)
        dk *= scale
        if parts == 1:
            dk_head = dk_ptr + b * dk_strides[0] + kv_head * dk_strides[1]
            dv_head = dv_ptr + b * dv_strides[0] + kv_head * dv_strides[1]
            store_tile(dk_head, dk_strides[2], start_k + first_key, len_k - first_key, dk, D)
            store_tile(dv_head, dv_strides[2], start_k + first_key, len_k - first_key, dv, D)
        else:
            slot = tl.load(plan_ptr + 2 * units + unit) + item - tl.load(plan_ptr + unit)
            tile_ptr = partial_ptr + slot.to(tl.int64) * (2 * BLOCK_N * BLOCK_D)
            store_tile(tile_ptr, BLOCK_D, 0, BLOCK_N, dk, BLOCK_D)
            store_tile(tile_ptr, BLOCK_D, BLOCK_N, BLOCK_N, dv, BLOCK_D)
        item = next_item


@jit(*LENGTHS, "units", "padded")
def join_kernel(
    dk_ptr,
    dv_ptr,
    plan_ptr,
    partial_ptr,
    starts_q_ptr,
    starts_k_ptr,
    dk_strides,
    dv_strides,
    units,
    columns,
    num_queries,
    num_keys,
    sequences,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Add up the parts of one KV tile, in order, if it has several."""
    TILES: tl.constexpr = BLOCK_K // BLOCK_N
    unit = tl.program_id(0)
    parts = tl.load(plan_ptr + units + unit)
    if parts > 1:
        column, tile = unit // TILES, unit % TILES
        kv_head, b = (column // columns % KV_HEADS).to(tl.int64), (column // columns // KV_HEADS).to(tl.int64)
        block, _, _, _, start_k, len_k = sequence_of(
            column % columns, starts_k_ptr, (starts_q_ptr, starts_k_ptr, sequences), num_queries, num_keys,
            BLOCK_K, BLOCK_Q, SEQUENCES,
        )  # fmt: skip
        first_key = block * BLOCK_K + tile * BLOCK_N
        slot = tl.load(plan_ptr + 2 * units + unit)
        tile_ptr = partial_ptr + slot.to(tl.int64) * (2 * BLOCK_N * BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        for _ in range(0, parts):
            dk += load_tile(tile_ptr, BLOCK_D, 0, BLOCK_N, BLOCK_N, BLOCK_D, BLOCK_D)
            dv += load_tile(tile_ptr, BLOCK_D, BLOCK_N, BLOCK_N, BLOCK_N, BLOCK_D, BLOCK_D)
            tile_ptr += 2 * BLOCK_N * BLOCK_D
        dk_head = dk_ptr + b * dk_strides[0] + kv_head * dk_strides[1]
        dv_head = dv_ptr + b * dv_strides[0] + kv_head * dv_strides[1]
        store_tile(dk_head, dk_strides[2], start_k + first_key, len_k - first_key, dk, D)
        store_tile(dv_head, dv_strides[2], start_k + first_key, len_k - first_key, dv, D)
