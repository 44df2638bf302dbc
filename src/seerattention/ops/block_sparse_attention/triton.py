"""A Triton kernel for any GPU that Triton compiles for.

Programs are persistent: each takes one query tile after another from a counter, expands the bits of
the tile's row into a list of its own in global memory, and runs over the list with the usual online
softmax. The host learns nothing of the selection. Design and roofline: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention._options import Options
from seerattention.selection import BlockSelection, num_blocks

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = None

#: Whether the kernel runs in Triton's interpreter (TRITON_INTERPRET=1 when this file was imported).
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)
MAX_HEAD_DIM = 256
BLOCKS_K = (16, 32, 64, 128)


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled and started.

    Attributes:
        block_m: Query tokens per tile; a longer query block is several tiles.
        block_n: Keys per step; a longer KV block is several steps.
        warps: Warps per program.
        stages: Steps of the loop over KV blocks that are in flight.
        programs: Programs per multiprocessor.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int


def launch_of(head_dim: int, block_size: tuple[int, int], itemsize: int) -> Launch:
    """Choose the launch of a call: the largest tiles that need no register spills.

    Args:
        head_dim: ``D``.
        block_size: Tokens per (query block, KV block).
        itemsize: Bytes per element of q, k and v.
    """
    block_q, block_k = block_size
    wide = _power_of_two(head_dim)
    if itemsize == 4:
        # fp32 products run outside the tensor cores and hold their operands in registers.
        most_m, most_n, stages = (32, 32, 2) if wide <= 128 else (16, 32, 1)
    elif wide <= 128:
        most_m, most_n, stages = 128, 64 if wide == 128 else 128, 3
    else:
        most_m, most_n, stages = 64, 64, 2
    block_m = min(max(_power_of_two(block_q), 16), most_m)
    warps = 8 if block_m * wide > 64 * 128 else 4
    return Launch(block_m, min(block_k, most_n), warps, stages, programs=2 if warps == 8 else 4)


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    if q.device.type != "cuda" and not (INTERPRETED and q.device.type == "cpu"):
        return ["it needs a GPU"]
    if triton is None:
        return ["triton is not installed; `pip install triton` brings it"]
    reasons = []
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        reasons.append("it has no backward; use backend='reference' for gradients")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(
            f"it computes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"
        )
    elif INTERPRETED and q.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        reasons.append(f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[3]}")
    if selection.block_size[1] not in BLOCKS_K:
        allowed = ", ".join(map(str, BLOCKS_K))
        reasons.append(f"KV blocks must have one of {allowed} tokens, got {selection.block_size[1]}")
    for name, x in {"q": q, "k": k, "v": v, "selection.bits": selection.bits}.items():
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            reasons.append(f"the last dimension of {name} must be contiguous, its stride is {x.stride(-1)}")
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    # A custom operator costs tens of microseconds, which only a compiler needs to spend.
    launch = _operator if torch.compiler.is_compiling() else _launch
    out, lse = launch(
        q,
        k,
        v,
        selection.bits,
        list(selection.block_size),
        selection.shape[3],
        options.scale,
        options.softcap,
        options.sinks,
        options.return_lse,
        options.cu_seqlens_q,
        options.cu_seqlens_k,
    )
    return (out, lse) if options.return_lse else out


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


def _programs(device: torch.device, launch: Launch) -> int:
    if device.type == "cpu":
        return 2
    return launch.programs * torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    block_size: list[int],
    num_kv_blocks: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Start the kernel; everything it needs to know of the selection it reads on the device."""
    if scale <= 0:
        # The kernel takes maxima and masks before it scales.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    out, lse = _outputs(q, return_lse)
    batch, heads, num_queries, head_dim = q.shape
    block_q, block_k = block_size
    launch = launch_of(head_dim, (block_q, block_k), q.element_size())
    tiles = num_blocks(block_q, launch.block_m)
    items = batch * heads * bits.shape[2] * tiles
    programs = min(items, _programs(q.device, launch))
    # A program's list, and one entry more, which is read ahead.
    scratch = torch.empty(programs * (num_kv_blocks + 1), dtype=torch.int32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    sequences = 0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    # A tensor that is not used still needs a pointer.
    _kernel[(programs,)](
        q,
        k,
        v,
        out,
        lse,
        bits,
        scratch,
        counter,
        counter if sinks is None else sinks,
        counter if cu_seqlens_q is None else cu_seqlens_q,
        counter if cu_seqlens_k is None else cu_seqlens_k,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        bits.stride(0) if bits.shape[0] > 1 else 0,
        *bits.stride()[1:3],
        items,
        bits.shape[2],
        num_kv_blocks,
        num_queries,
        k.shape[2],
        sequences,
        scale,
        0.0 if softcap is None else softcap,
        HEADS=heads,
        KV_HEADS=k.shape[1],
        BIT_HEADS=bits.shape[1],
        D=head_dim,
        BLOCK_D=max(_power_of_two(head_dim), 16),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        LSE=return_lse,
        SEQUENCES=_power_of_two(sequences) if sequences else 0,
        STAGES=launch.stages,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out, lse


#: The decorator of device functions; without triton they are never called.
_jit: Any = (lambda f: f) if triton is None else triton.jit


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

    ``maximum`` and ``scores * scale`` are logarithms to base 2; ``first_query`` is the place of the
    tile's first query among the keys.
    """
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside = keys < len_k - first_key
    k_ptrs = k_ptr + first_key.to(tl.int64) * stride_kt + (keys[None, :] * stride_kt + dims[:, None])
    v_ptrs = v_ptr + first_key.to(tl.int64) * stride_vt + (keys[:, None] * stride_vt + dims[None, :])
    k = tl.load(k_ptrs, mask=inside[None, :] & (dims < D)[:, None], other=0.0)
    v = tl.load(v_ptrs, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee")
    if SOFTCAP:
        scores = _cap(scores * scale, softcap, q.dtype == tl.float32)
        scale = 1.4426950408889634
    # Only a row's own blocks hold keys after a query of the tile.
    if first_key + BLOCK_N > first_query + 1:
        later = (first_key + keys)[None, :] > (first_query + tl.arange(0, BLOCK_M))[:, None]
        scores = tl.where(later, float("-inf"), scores)
    new = tl.maximum(maximum, tl.max(scores, 1) * scale)
    # Infinite while a query has seen nothing.
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores * scale - finite[:, None])
    fade = tl.exp2(maximum - finite)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
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
def _kernel(
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
    item = tl.atomic_add(counter_ptr, 1)
    while item < items:
        # One KV head after another keeps its keys in the cache; its late rows, which read most, first.
        tile = item % TILES
        head_in_group = item // TILES % GROUP
        row_of_head = item // (TILES * GROUP)
        row = rows - 1 - row_of_head % rows
        kv_head = row_of_head // rows % KV_HEADS
        b = (row_of_head // rows // KV_HEADS).to(tl.int64)
        head = kv_head * GROUP + head_in_group
        bits_row = bits_ptr + b * stride_bits_b + (head // (HEADS // BIT_HEADS)).to(tl.int64) * stride_bits_h
        bits_row += row.to(tl.int64) * stride_bits_row

        start_q = 0
        start_k = 0
        len_q = num_queries
        len_k = num_keys
        if SEQUENCES > 0:
            row, start_q, len_q, start_k, len_k = _sequence_of(
                row, cu_q_ptr, cu_k_ptr, sequences, BLOCK_Q, SEQUENCES
            )
        first = row * BLOCK_Q + tile * BLOCK_M
        end = tl.minimum(tl.minimum(first + BLOCK_M, (row + 1) * BLOCK_Q), len_q)
        places = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        here = (places < end - first)[:, None] & (dims < D)[None, :]
        # 64 bits for where a tile starts, 32 within it.
        token = (start_q + first).to(tl.int64)
        q_tile = q_ptr + b * stride_qb + head.to(tl.int64) * stride_qh + token * stride_qt
        q = tl.load(q_tile + (places[:, None] * stride_qt + dims[None, :]), mask=here, other=0.0)
        # Asked for early, so that the answer travels together with the queries.
        next_item = tl.atomic_add(counter_ptr, 1)

        first_query = len_k - len_q + first
        last_query = len_k - len_q + end - 1
        last_block = tl.minimum(tl.where(last_query < 0, -1, last_query // BLOCK_K), columns - 1)
        last_block = tl.where(end <= first, -1, last_block)
        # Nobody may still read the list of the tile before.
        tl.debug_barrier()
        count = _expand(bits_row, list_ptr, last_block, 32)
        tl.debug_barrier()

        k_head = k_ptr + b * stride_kb + kv_head.to(tl.int64) * stride_kh + start_k.to(tl.int64) * stride_kt
        v_head = v_ptr + b * stride_vb + kv_head.to(tl.int64) * stride_vh + start_k.to(tl.int64) * stride_vt
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        log2_scale = scale if SOFTCAP else scale * 1.4426950408889634
        if SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
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
        out_tile = out_ptr + b * stride_ob + head.to(tl.int64) * stride_oh + token * stride_ot
        tl.store(out_tile + (places[:, None] * stride_ot + dims[None, :]), acc.to(q.dtype), mask=here)
        if LSE:
            lse_tile = lse_ptr + (b * HEADS + head) * num_queries + token
            lse = (maximum + tl.log2(total)) * 0.6931471805599453
            tl.store(lse_tile + places, lse, mask=places < end - first)
        item = next_item


_operator = torch.library.custom_op("seerattention::block_sparse_triton", _launch, mutates_args=())


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, block_size: list[int], num_kv_blocks: int, scale: float,
    softcap: float | None, sinks: Tensor | None, return_lse: bool, *cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(q, return_lse)
