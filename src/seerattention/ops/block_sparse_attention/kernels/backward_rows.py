"""The backward's device functions that go row by row; `backward.py` beside this file starts them."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.block_sparse_attention.kernels.forward import (
    LENGTHS,
    expand,
    first_words,
    open_row,
)
from seerattention.ops.language import add_product, cap, jit, load_tile, score, store_tile, tl


@jit("num_queries", "padded", "tiles")
def rows_kernel(
    out_ptr,
    grad_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    shift_ptr,
    out_strides,
    grad_strides,
    num_queries,
    padded,
    tiles,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write what the other kernels need of every query: ``delta`` and the softmax's ``shift``.

    A score's gradient is ``p * (dp - delta)`` with ``delta = sum(out * grad) - grad_lse``; ``p`` is
    ``exp(score - shift)`` if ``EXACT`` and ``exp2`` of numbers scaled alike otherwise. Queries that saw
    nothing, and places up to ``padded`` where there is none, get infinity, and so a ``p`` of 0.
    """
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * TILE
    places = first + tl.arange(0, TILE)
    b, head = pair // HEADS, pair % HEADS
    inside = places < num_queries
    out_head = out_ptr + b * out_strides[0] + head * out_strides[1]
    grad_head = grad_ptr + b * grad_strides[0] + head * grad_strides[1]
    out = load_tile(out_head, out_strides[2], first, num_queries - first, TILE, D, BLOCK_D)
    grad = load_tile(grad_head, grad_strides[2], first, num_queries - first, TILE, D, BLOCK_D)
    at = pair * num_queries + places
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    delta -= tl.load(grad_lse_ptr + at, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    shift = tl.where(lse == float("-inf"), float("inf"), lse * (1.0 if EXACT else 1.4426950408889634))
    at = pair * padded + places
    tl.store(delta_ptr + at, delta, mask=places < padded)
    tl.store(shift_ptr + at, shift, mask=places < padded)


@jit
def shares(scores, shift, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Return the softmax's probabilities, and the derivative of the capped scores (1 without a cap).

    Masks come after: a score that a query may not see can overflow here, and is replaced then.
    """
    slope = 1.0
    if SOFTCAP:
        scores = cap(scores * scale, softcap, EXACT)
        share = scores / softcap
        slope = 1 - share * share
        scale = 1.0
    if EXACT:
        p = tl.exp2((scores * scale - shift) * 1.4426950408889634)
    else:
        p = tl.exp2(scores * (scale * 1.4426950408889634) - shift)
    return p, slope


@jit
def copy_tiles(one, other, b, head, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Have TMA bring ``[ROWS, BLOCK_D]`` of two tensors, zeros past their last token."""
    a = tl.reshape(one.load([b, head, first, 0]), [ROWS, BLOCK_D])
    return a, tl.reshape(other.load([b, head, first, 0]), [ROWS, BLOCK_D])


@jit(*LENGTHS, "padded")
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    k_desc,
    v_desc,
    dq_ptr,
    shift_ptr,
    delta_ptr,
    bits_ptr,
    scratch_ptr,
    counter_ptr,
    starts_q_ptr,
    starts_k_ptr,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dq_strides,
    stride_bits_b,
    stride_bits_h,
    stride_bits_row,
    items,
    rows,
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
    """Take query tiles from the counter, as the forward does, and write their gradients."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    list_ptr = scratch_ptr + tl.program_id(0) * (columns + 1)
    item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < items:
        batch, group, head, bits_row, last_block, token, queries, first_query, start_k, len_k = open_row(
            item, rows, columns, bits_ptr, (stride_bits_b, stride_bits_h, stride_bits_row),
            (starts_q_ptr, starts_k_ptr, sequences), num_queries, num_keys,
            HEADS, KV_HEADS, BIT_HEADS, BLOCK_Q, BLOCK_K, BLOCK_M, SEQUENCES,
        )  # fmt: skip
        b, kv_head, head = batch.to(tl.int64), group.to(tl.int64), head.to(tl.int64)
        q_head = q_ptr + b * q_strides[0] + head * q_strides[1]
        grad_head = grad_ptr + b * grad_strides[0] + head * grad_strides[1]
        q = load_tile(q_head, q_strides[2], token, queries, BLOCK_M, D, BLOCK_D)
        grad = load_tile(grad_head, grad_strides[2], token, queries, BLOCK_M, D, BLOCK_D)
        places = tl.arange(0, BLOCK_M)
        at = (b * HEADS + head) * padded + token + places
        shift = tl.load(shift_ptr + at, mask=places < queries, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=places < queries, other=0.0)
        next_item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
        word = first_words(bits_row, last_block // 32, 32)
        count = expand(bits_row, word, list_ptr, last_block, 32)

        k_head = k_ptr + b * k_strides[0] + kv_head * k_strides[1]
        v_head = v_ptr + b * v_strides[0] + kv_head * v_strides[1]
        keys = tl.arange(0, BLOCK_N)
        dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        block = tl.load(list_ptr)
        for i in tl.range(0, count * STEPS, num_stages=STAGES):
            first_key = block * BLOCK_K + i % STEPS * BLOCK_N
            block = tl.load(list_ptr + (i + 1) // STEPS)
            if TMA:
                k, v = copy_tiles(k_desc, v_desc, batch, group, start_k + first_key, BLOCK_N, BLOCK_D)
            else:
                begin, inside = start_k + first_key, len_k - first_key
                k = load_tile(k_head, k_strides[2], begin, inside, BLOCK_N, D, BLOCK_D)
                v = load_tile(v_head, v_strides[2], begin, inside, BLOCK_N, D, BLOCK_D)
            p, slope = shares(
                score(q, tl.trans(k), scale), shift[:, None], scale, softcap, SOFTCAP, q.dtype == tl.float32
            )
            # Only a row's own blocks hold keys after a query of the tile.
            if first_key + BLOCK_N > first_query + 1:
                p = tl.where((first_key + keys)[None, :] > (first_query + places)[:, None], 0.0, p)
            ds = p * (score(grad, tl.trans(v), scale) - delta[:, None]) * slope
            dq = add_product(dq, ds, k, scale)
        dq_head = dq_ptr + b * dq_strides[0] + head * dq_strides[1]
        store_tile(dq_head, dq_strides[2], token, queries, dq * scale, D)
        item = next_item
