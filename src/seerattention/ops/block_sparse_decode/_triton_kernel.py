"""The device functions; `triton.py` beside this file starts them."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from seerattention.ops.block_sparse_attention.kernels.forward import expand, first_words, look_up, step
from seerattention.ops.language import jit, load_tile, release, softmax_start, store_tile, tl, wait


@jit
def natural(scale, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Return what one unit of a running maximum is in natural logarithms."""
    return (1.0 if SOFTCAP else scale) if EXACT else 0.6931471805599453


@jit
def place_of(item, num_queries, HEADS: tl.constexpr, LISTS: tl.constexpr):
    """Return an item's batch entry, its list, its first query head and its token."""
    token = item % num_queries
    which = item // num_queries % LISTS
    b = (item // num_queries // LISTS).to(tl.int64)
    return b, which, which * (HEADS // LISTS), token


#: Numbers that change from call to call.
NUMBERS = (
    *("stride_bits_b", "stride_bits_h", "stride_bits_row", "stride_pages"),
    *("columns", "num_queries", "num_keys"),
)


@jit(*NUMBERS)
def decode_kernel(  # noqa: PLR0915
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    parts_ptr,
    state_ptr,
    bits_ptr,
    scratch_ptr,
    sinks_ptr,
    lengths_ptr,
    starts_ptr,
    pages_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    stride_bits_b,
    stride_bits_h,
    stride_bits_row,
    stride_pages,
    columns,
    num_queries,
    num_keys,
    scale,
    softcap,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BIT_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    STARTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend to one split's share of what a token selected from one KV head; ``PAGE`` blocks are a page."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    GROUP: tl.constexpr = HEADS // LISTS
    item, split = tl.program_id(0), tl.program_id(1)
    b, which, head, token = place_of(item, num_queries, HEADS, LISTS)
    bits_row = bits_ptr + b * stride_bits_b + (which // (LISTS // BIT_HEADS)).to(tl.int64) * stride_bits_h
    bits_row += token.to(tl.int64) * stride_bits_row
    wait(PDL)
    # Asked for before the length is there, which they do not wait for.
    word = first_words(bits_row, (columns - 1) // 32, WORDS)
    first = 0
    if STARTS:
        first = tl.load(starts_ptr + b)
    # Keys that the token sees, its own the last of them.
    seen = num_keys - first
    if LENGTHS:
        seen = tl.load(lengths_ptr + b)
    seen += token + 1 - num_queries
    last_block = tl.minimum(tl.where(seen > 0, (seen - 1) // BLOCK_K, -1), columns - 1)
    list_ptr = scratch_ptr + (item.to(tl.int64) * SPLITS + split) * 2 * (columns + 1)
    count = expand(bits_row, word, list_ptr, last_block, WORDS)
    begin, end = count * split // SPLITS, count * (split + 1) // SPLITS
    if PAGE:
        page_list = list_ptr + columns + 1
        look_up(
            list_ptr, begin, end, pages_ptr + b * stride_pages, page_list, seen, BLOCK_K, PAGE * BLOCK_K, 64
        )

    q_heads = q_ptr + b * q_strides[0] + head * q_strides[1] + token * q_strides[2]
    q = load_tile(q_heads, q_strides[1], 0, GROUP, BLOCK_M, D, BLOCK_D)
    kv_head = (which // (LISTS // KV_HEADS)).to(tl.int64)
    k_head, v_head = k_ptr + kv_head * k_strides[1], v_ptr + kv_head * v_strides[1]
    if STARTS:
        k_head += tl.cast(first, tl.int64) * k_strides[2]
        v_head += tl.cast(first, tl.int64) * v_strides[2]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    unit = natural(scale, SOFTCAP, q.dtype == tl.float32)
    rows = tl.arange(0, BLOCK_M)
    maximum, total = softmax_start(sinks_ptr, head + tl.minimum(rows, GROUP - 1), unit, BLOCK_M, SINKS)
    if SINKS and SPLITS > 1:
        maximum = tl.where(split == 0, maximum, float("-inf"))
        total = tl.where(split == 0, total, 0.0)

    # Lists are read one step ahead, so that the loads of keys and values never wait for them.
    block = tl.load(list_ptr + begin)
    page = b.to(tl.int32)
    if PAGE:
        page = tl.load(page_list + begin)
    log2_scale = scale if SOFTCAP else scale * 1.4426950408889634
    for i in tl.range(0, (end - begin) * STEPS, num_stages=STAGES):
        first_key = block * BLOCK_K + i % STEPS * BLOCK_N
        # Where the page would begin if all before it were in front of it.
        far = page.to(tl.int64)
        k_from, v_from = k_head + far * k_strides[0], v_head + far * v_strides[0]
        if PAGE:
            before = (block // PAGE * PAGE * BLOCK_K).to(tl.int64)
            k_from -= before * k_strides[2]
            v_from -= before * v_strides[2]
            page = tl.load(page_list + begin + (i + 1) // STEPS)
        block = tl.load(list_ptr + begin + (i + 1) // STEPS)
        acc, maximum, total = step(
            q, acc, maximum, total, k_from, v_from, k_strides[2], v_strides[2], first_key, seen - 1, seen,
            log2_scale, softcap, SOFTCAP, D, BLOCK_D, BLOCK_M, BLOCK_N, 0,
        )  # fmt: skip

    release(PDL)
    if SPLITS == 1:
        # A query that sees nothing gets zeros.
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        out_heads = out_ptr + b * out_strides[0] + head * out_strides[1] + token * out_strides[2]
        store_tile(out_heads, out_strides[1], 0, GROUP, acc, D)
        if LSE:
            lse = maximum * unit + tl.log2(total) * 0.6931471805599453
            tl.store(lse_ptr + (b * HEADS + head + rows) * num_queries + token, lse, mask=rows < GROUP)
    else:
        part = item.to(tl.int64) * SPLITS + split
        store_tile(parts_ptr + part * GROUP * D, D, 0, GROUP, acc, D)
        tl.store(state_ptr + part * 2 * GROUP + rows, maximum, mask=rows < GROUP)
        tl.store(state_ptr + (part * 2 + 1) * GROUP + rows, total, mask=rows < GROUP)


@jit("num_queries")
def merge_kernel(
    parts_ptr,
    state_ptr,
    out_ptr,
    lse_ptr,
    out_strides,
    num_queries,
    scale,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LSE: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the splits of one query head of an item, always in one order."""
    GROUP: tl.constexpr = HEADS // LISTS
    item, row = tl.program_id(0), tl.program_id(1)
    b, _, head, token = place_of(item, num_queries, HEADS, LISTS)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    parts = item.to(tl.int64) * SPLITS + splits
    wait(PDL)
    maxima = tl.load(state_ptr + parts * 2 * GROUP + row)
    totals = tl.load(state_ptr + (parts * 2 + 1) * GROUP + row)
    places = (parts * GROUP + row)[:, None] * D + dims[None, :]
    accs = tl.load(parts_ptr + places, mask=(dims < D)[None, :], other=0.0)
    unit = natural(scale, SOFTCAP, EXACT)
    maximum = tl.max(maxima, 0)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp2((maxima - finite) * (unit * 1.4426950408889634))
    total = tl.sum(weights * totals, 0)
    out = tl.sum(weights[:, None] * accs, 0) / tl.where(total == 0, 1.0, total)
    out_row = out_ptr + b * out_strides[0] + (head + row) * out_strides[1] + token * out_strides[2]
    tl.store(out_row + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)
    if LSE:
        lse = maximum * unit + tl.log2(total) * 0.6931471805599453
        tl.store(lse_ptr + (b * HEADS + head + row) * num_queries + token, lse)
