"""The backward's device functions that go row by row; `_backward.py` beside this file starts them."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.block_sparse_attention._kernels.forward import (
    _LENGTHS,
    _cap,
    _expand,
    _jit,
    _last_block,
    _product,
    _product_in_parts,
    _sequence_of,
    _tile_of,
    tl,
)


@_jit(do_not_specialize=["num_queries", "padded", "tiles"])
def rows_kernel(
    out_ptr,
    grad_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    shift_ptr,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
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
    places, dims = first + tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    b, head = pair // HEADS, pair % HEADS
    inside = places < num_queries
    here = inside[:, None] & (dims < D)[None, :]
    token = places.to(tl.int64)[:, None]
    out = tl.load(out_ptr + b * stride_ob + head * stride_oh + token * stride_ot + dims, mask=here, other=0.0)
    grad = tl.load(
        grad_ptr + b * stride_gb + head * stride_gh + token * stride_gt + dims, mask=here, other=0.0
    )
    at = pair * num_queries + places
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    delta -= tl.load(grad_lse_ptr + at, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    shift = tl.where(lse == float("-inf"), float("inf"), lse * (1.0 if EXACT else 1.4426950408889634))
    at = pair * padded + places
    tl.store(delta_ptr + at, delta, mask=places < padded)
    tl.store(shift_ptr + at, shift, mask=places < padded)


@_jit
def _shares(scores, shift, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Return the softmax's probabilities, and the derivative of the capped scores (1 without a cap).

    Masks come after: a score that a query may not see can overflow here, and is replaced then.
    """
    slope = 1.0
    if SOFTCAP:
        scores = _cap(scores * scale, softcap, EXACT)
        share = scores / softcap
        slope = 1 - share * share
        scale = 1.0
    if EXACT:
        p = tl.exp2((scores * scale - shift) * 1.4426950408889634)
    else:
        p = tl.exp2(scores * (scale * 1.4426950408889634) - shift)
    return p, slope


@_jit
def _load_tile(pointer, stride, first, inside, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load ``[ROWS, BLOCK_D]`` from token ``first`` on, zeros past ``inside`` tokens."""
    places, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    # 64 bits for where a tile starts, 32 within it.
    tile = pointer + tl.cast(first, tl.int64) * stride + (places[:, None] * stride + dims[None, :])
    here = (places < inside)[:, None]
    if D != BLOCK_D:
        here = here & (dims < D)[None, :]
    return tl.load(tile, mask=here, other=0.0)


@_jit
def _store_tile(pointer, stride, first, inside, x, D: tl.constexpr):
    places, dims = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    tile = pointer + tl.cast(first, tl.int64) * stride + (places[:, None] * stride + dims[None, :])
    here = (places < inside)[:, None] & (dims < D)[None, :]
    tl.store(tile, x.to(pointer.dtype.element_ty), mask=here)


@_jit
def _score(a, b, scale, BLOCK_D: tl.constexpr):
    """Return ``a @ b.T``; any finite ``scale`` does."""
    # The kernel's language has no conditional expression on types.
    if a.dtype == tl.float32:
        product = _product_in_parts(a, tl.trans(b), scale * 0.0, (BLOCK_D + 31) // 32)
    else:
        product = tl.dot(a, tl.trans(b))
    return product


@_jit
def _add_product(total, weights, x, scale):
    """Return ``total + weights @ x``, the weights rounded to the type of ``x``; any finite ``scale`` does."""
    if x.dtype == tl.float32:
        # A sum per block and then their sum: in one chain the rounding errors would add up.
        total += _product(weights, x, scale * 0.0)
    else:
        total = tl.dot(weights.to(x.dtype), x, total)
    return total


@_jit
def _copy_tiles(one, other, b, head, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Have the copy engine bring ``[ROWS, BLOCK_D]`` of two tensors, zeros past their last token."""
    a = tl.reshape(one.load([b, head, first, 0]), [ROWS, BLOCK_D])
    return a, tl.reshape(other.load([b, head, first, 0]), [ROWS, BLOCK_D])


@_jit(do_not_specialize=[*_LENGTHS, "padded"])
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
    cu_q_ptr,
    cu_k_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_dqb,
    stride_dqh,
    stride_dqt,
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
    COPIES: tl.constexpr,
):
    """Take query tiles from the counter, as the forward does, and write their gradients."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    list_ptr = scratch_ptr + tl.program_id(0) * (columns + 1)
    item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < items:
        b, kv_head, head, row, tile = _tile_of(item, rows, KV_HEADS, GROUP, TILES)
        batch, group = b, kv_head
        b, kv_head, head = b.to(tl.int64), kv_head.to(tl.int64), head.to(tl.int64)
        bits_row = bits_ptr + b * stride_bits_b + head // (HEADS // BIT_HEADS) * stride_bits_h
        bits_row += row.to(tl.int64) * stride_bits_row
        start_q, start_k, len_q, len_k = 0, 0, num_queries, num_keys
        if SEQUENCES > 0:
            row, start_q, len_q, start_k, len_k = _sequence_of(
                row, cu_q_ptr, cu_k_ptr, sequences, BLOCK_Q, SEQUENCES
            )
        first = row * BLOCK_Q + tile * BLOCK_M
        end = tl.minimum(tl.minimum(first + BLOCK_M, (row + 1) * BLOCK_Q), len_q)
        token = start_q + first
        q_head, grad_head = (
            q_ptr + b * stride_qb + head * stride_qh,
            grad_ptr + b * stride_gb + head * stride_gh,
        )
        q = _load_tile(q_head, stride_qt, token, end - first, BLOCK_M, D, BLOCK_D)
        grad = _load_tile(grad_head, stride_gt, token, end - first, BLOCK_M, D, BLOCK_D)
        places = tl.arange(0, BLOCK_M)
        at = (b * HEADS + head) * padded + token + places
        shift = tl.load(shift_ptr + at, mask=places < end - first, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=places < end - first, other=0.0)
        next_item = tl.atomic_add(counter_ptr, 1, sem="relaxed")

        first_query = len_k - len_q + first
        last_block = tl.where(first < end, _last_block(len_k - len_q + end - 1, columns, BLOCK_K), -1)
        # Nobody may still read the list of the tile before.
        tl.debug_barrier()
        count = _expand(bits_row, list_ptr, last_block, 32)
        tl.debug_barrier()

        k_head, v_head = (
            k_ptr + b * stride_kb + kv_head * stride_kh,
            v_ptr + b * stride_vb + kv_head * stride_vh,
        )
        keys = tl.arange(0, BLOCK_N)
        dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        block = tl.load(list_ptr)
        for i in tl.range(0, count * STEPS, num_stages=STAGES):
            first_key = block * BLOCK_K + i % STEPS * BLOCK_N
            block = tl.load(list_ptr + (i + 1) // STEPS)
            if COPIES:
                k, v = _copy_tiles(k_desc, v_desc, batch, group, start_k + first_key, BLOCK_N, BLOCK_D)
            else:
                k = _load_tile(k_head, stride_kt, start_k + first_key, len_k - first_key, BLOCK_N, D, BLOCK_D)
                v = _load_tile(v_head, stride_vt, start_k + first_key, len_k - first_key, BLOCK_N, D, BLOCK_D)
            p, slope = _shares(
                _score(q, k, scale, BLOCK_D), shift[:, None], scale, softcap, SOFTCAP, q.dtype == tl.float32
            )
            # Only a row's own blocks hold keys after a query of the tile.
            if first_key + BLOCK_N > first_query + 1:
                p = tl.where((first_key + keys)[None, :] > (first_query + places)[:, None], 0.0, p)
            ds = p * (_score(grad, v, scale, BLOCK_D) - delta[:, None]) * slope
            dq = _add_product(dq, ds, k, scale)
        dq_head = dq_ptr + b * stride_dqb + head * stride_dqh
        _store_tile(dq_head, stride_dqt, token, end - first, dq * scale, D)
        item = next_item
