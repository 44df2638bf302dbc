"""The device functions of the Triton backend; `triton.py` beside this file starts them."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import importlib
from typing import Any


def _find(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


#: Both None where Triton is not installed; the functions below are then never called.
triton, tl = _find("triton"), _find("triton.language")


def _jit(function: Any = None, **options: Any) -> Any:
    if triton is None:
        return function or (lambda f: f)
    return triton.jit(function, **options)


#: Numbers that change from call to call: a kernel each for those that 16 divides would be compiled anew
#: for another length.
_LENGTHS = [
    *("stride_bits_b", "stride_bits_h", "stride_bits_row", "items", "rows", "columns"),
    *("num_queries", "num_keys", "sequences"),
]


@_jit
def _expand(bits_ptr, list_ptr, last_block, WORDS: tl.constexpr):
    """Write the numbers of the set bits up to ``last_block``, ascending, and return how many there are."""
    places = tl.arange(0, 32)
    count = 0
    for start in range(0, last_block // 32 + 1, WORDS):
        words = start + tl.arange(0, WORDS)
        word = tl.load(bits_ptr + words, mask=words <= last_block // 32, other=0)
        blocks = words[:, None] * 32 + places[None, :]
        chosen = ((word[:, None] >> places[None, :]) & 1) & (blocks <= last_block).to(tl.int32)
        in_word = tl.sum(chosen, 1)
        before = count + tl.cumsum(in_word, 0) - in_word
        rank = before[:, None] + tl.cumsum(chosen, 1) - 1
        tl.store(list_ptr + rank, blocks, mask=chosen != 0)
        count += tl.sum(in_word, 0)
    return count


@_jit
def _cap(scores, softcap, EXACT: tl.constexpr):
    """Return ``softcap * tanh(scores / softcap)``, written with exp2, which every target has."""
    x = scores / softcap
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    y = (1 - e) / (1 + e)
    y = tl.where(x < 0, -y, y)
    if EXACT:
        # 1 - e cancels for small x; the series is exact to fp32 below 0.3.
        s = x * x
        series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
        y = tl.where(tl.abs(x) < 0.3, x * series, y)
    return softcap * y


@_jit
def _product(a, b, zero):
    """Return ``a @ b`` of fp32, a chain of additions of its own.

    ``zero`` is a number that the compiler does not know: it turns the sum of something and a product that
    starts at a constant zero into one chain of both, whose rounding errors add up.
    """
    return tl.dot(a, b, tl.zeros([a.shape[0], b.shape[1]], tl.float32) + zero, input_precision="ieee")


@_jit
def _product_in_parts(q, k, zero, PARTS: tl.constexpr):
    """Return ``q @ k`` in fp32 as a sum of ``PARTS`` products, whose shorter chains round less."""
    if PARTS == 1:
        product = _product(q, k, zero)
    else:
        q_even, q_odd = tl.split(tl.reshape(q, [q.shape[0], q.shape[1] // 2, 2]))
        k_even, k_odd = tl.split(tl.permute(tl.reshape(k, [k.shape[0] // 2, 2, k.shape[1]]), (0, 2, 1)))
        product = _product_in_parts(q_even, k_even, zero, PARTS // 2)
        product += _product_in_parts(q_odd, k_odd, zero, PARTS // 2)
    return product


@_jit
def _step(
    q,
    acc,
    maximum,
    total,
    k_ptr,
    v_ptr,
    stride_kt,
    stride_vt,
    first_key,
    first_query,
    len_k,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add ``BLOCK_N`` keys from ``first_key`` on to the running softmax.

    ``scores * scale`` are logarithms to base 2, and so is ``maximum``; in fp32 it is left unscaled, since
    scaling a difference rounds less than the difference of two scaled numbers, which is one operation
    shorter. ``first_query`` is the place of the tile's first query among the keys.
    """
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside = keys < len_k - first_key
    k_ptrs = k_ptr + first_key.to(tl.int64) * stride_kt + (keys[None, :] * stride_kt + dims[:, None])
    v_ptrs = v_ptr + first_key.to(tl.int64) * stride_vt + (keys[:, None] * stride_vt + dims[None, :])
    k = tl.load(k_ptrs, mask=inside[None, :] & (dims < D)[:, None], other=0.0)
    v = tl.load(v_ptrs, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    # The kernel's language has no conditional expression on types.
    if q.dtype == tl.float32:
        scores = _product_in_parts(q, k, scale * 0.0, (BLOCK_D + 31) // 32)
    else:
        scores = tl.dot(q, k)
    if SOFTCAP:
        scores = _cap(scores * scale, softcap, q.dtype == tl.float32)
        scale = 1.4426950408889634
    # Only a row's own blocks hold keys after a query of the tile.
    if first_key + BLOCK_N > first_query + 1:
        later = (first_key + keys)[None, :] > (first_query + tl.arange(0, BLOCK_M))[:, None]
        scores = tl.where(later, float("-inf"), scores)
    new = tl.maximum(maximum, tl.max(scores, 1) * (1.0 if q.dtype == tl.float32 else scale))
    # Infinite while a query has seen nothing.
    finite = tl.where(new == float("-inf"), 0.0, new)
    if q.dtype == tl.float32:
        p = tl.exp2((scores - finite[:, None]) * scale)
        fade = tl.exp2((maximum - finite) * scale)
    else:
        p = tl.exp2(scores * scale - finite[:, None])
        fade = tl.exp2(maximum - finite)
    total = total * fade + tl.sum(p, 1)
    if q.dtype == tl.float32:
        # A sum per block and then their sum: in one chain of all keys the rounding errors would add up.
        acc = acc * fade[:, None] + _product(p, v, scale * 0.0)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
    return acc, new, total


@_jit
def _sequence_of(row, cu_q_ptr, cu_k_ptr, sequences, BLOCK_Q: tl.constexpr, SEQUENCES: tl.constexpr):
    """Find the packed sequence of a row: its row there, and the sequence's starts and lengths."""
    s = tl.arange(0, SEQUENCES)
    start = tl.load(cu_q_ptr + s, mask=s < sequences, other=0)
    end = tl.load(cu_q_ptr + s + 1, mask=s < sequences, other=0)
    rows = (end - start + BLOCK_Q - 1) // BLOCK_Q
    ends = tl.cumsum(rows, 0)
    before = (ends <= row) & (s < sequences)
    which = tl.sum(before.to(tl.int32), 0)
    row -= tl.sum(tl.where(before, rows, 0), 0)
    # Past the last sequence there are no queries.
    inside = which < sequences
    start_q = tl.load(cu_q_ptr + which, mask=inside, other=0)
    len_q = tl.load(cu_q_ptr + which + 1, mask=inside, other=0) - start_q
    start_k = tl.load(cu_k_ptr + which, mask=inside, other=0)
    len_k = tl.load(cu_k_ptr + which + 1, mask=inside, other=0) - start_k
    return row, start_q, len_q, start_k, len_k


@_jit
def _tile_of(item, rows, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr):
    """Return the batch entry, KV head, query head, row and tile of a piece of work.

    One KV head after another keeps its keys in the cache; its late rows, which read most, come first.
    """
    tile = item % TILES
    in_group = item // TILES % GROUP
    row = item // (TILES * GROUP)
    kv_head = row // rows % KV_HEADS
    return row // rows // KV_HEADS, kv_head, kv_head * GROUP + in_group, rows - 1 - row % rows, tile


@_jit
def _last_block(last_query, columns, BLOCK_K: tl.constexpr):
    """Return the last block that a query sees, -1 for none."""
    return tl.minimum(tl.where(last_query < 0, -1, last_query // BLOCK_K), columns - 1)


@_jit(do_not_specialize=_LENGTHS)
def attention_kernel(  # noqa: PLR0915
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    bits_ptr,
    scratch_ptr,
    counter_ptr,
    sinks_ptr,
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
    stride_ob,
    stride_oh,
    stride_ot,
    stride_bits_b,
    stride_bits_h,
    stride_bits_row,
    items,
    rows,
    columns,
    num_queries,
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
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take query tiles from the counter until there are none left."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    list_ptr = scratch_ptr + tl.program_id(0) * (columns + 1)
    item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while item < items:
        b, kv_head, head, row, tile = _tile_of(item, rows, KV_HEADS, GROUP, TILES)
        # Products with strides may need 64 bits.
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
        places, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        here = (places < end - first)[:, None] & (dims < D)[None, :]
        # 64 bits for where a tile starts, 32 within it.
        token = tl.cast(start_q + first, tl.int64)
        q_tile = q_ptr + b * stride_qb + head * stride_qh + token * stride_qt
        q = tl.load(q_tile + (places[:, None] * stride_qt + dims[None, :]), mask=here, other=0.0)
        # Asked for early, so that the answer travels together with the queries.
        next_item = tl.atomic_add(counter_ptr, 1, sem="relaxed")

        first_query = len_k - len_q + first
        last_block = tl.where(first < end, _last_block(len_k - len_q + end - 1, columns, BLOCK_K), -1)
        # Nobody may still read the list of the tile before.
        tl.debug_barrier()
        count = _expand(bits_row, list_ptr, last_block, 32)
        tl.debug_barrier()

        k_head = k_ptr + b * stride_kb + kv_head * stride_kh + tl.cast(start_k, tl.int64) * stride_kt
        v_head = v_ptr + b * stride_vb + kv_head * stride_vh + tl.cast(start_k, tl.int64) * stride_vt
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        log2_scale = scale if SOFTCAP else scale * 1.4426950408889634
        # What one unit of `maximum` is in natural logarithms.
        natural_scale = 1.0 if SOFTCAP else scale
        unit = natural_scale if q.dtype == tl.float32 else 0.6931471805599453
        if SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) / unit
            maximum = tl.zeros([BLOCK_M], dtype=tl.float32) + sink
            total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
        else:
            maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
            total = tl.zeros([BLOCK_M], dtype=tl.float32)

        # The list is read one step ahead, so that the loads of keys and values never wait for it.
        block = tl.load(list_ptr)
        for i in tl.range(0, count * STEPS, num_stages=STAGES):
            first_key = block * BLOCK_K + i % STEPS * BLOCK_N
            block = tl.load(list_ptr + (i + 1) // STEPS)
            acc, maximum, total = _step(
                q, acc, maximum, total, k_head, v_head, stride_kt, stride_vt, first_key, first_query, len_k,
                log2_scale, softcap, SOFTCAP, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip

        # A query that sees nothing gets zeros.
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        out_tile = out_ptr + b * stride_ob + head * stride_oh + token * stride_ot
        tl.store(out_tile + (places[:, None] * stride_ot + dims[None, :]), acc.to(q.dtype), mask=here)
        if LSE:
            lse_tile = lse_ptr + (b * HEADS + head) * num_queries + token
            natural = maximum * unit + tl.log2(total) * 0.6931471805599453
            tl.store(lse_tile + places, natural, mask=places < end - first)
        item = next_item
