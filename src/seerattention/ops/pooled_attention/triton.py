"""A Triton kernel that returns attention and the map in one pass over the keys, on any GPU Triton knows.

Programs are persistent. An item is the rows of the map that one tile of queries makes (a query block longer
than a tile is several tiles; with one map per KV head, all heads of the group). A tile is the usual online
softmax; the largest score of every row and KV block, which the softmax takes anyway, goes to a scratch
that belongs to the program. When the softmax's denominators are known, the scratch is read back, turned
into weights and pooled into rows of the map. Design and roofline: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention._triton_kernel import triton
from seerattention.ops.copies import copied
from seerattention.ops.pooled_attention._options import PoolOptions
from seerattention.ops.pooled_attention._triton_kernel import pooled_kernel
from seerattention.ops.precision import DTYPES
from seerattention.rows import num_blocks

#: Whether the kernel runs in Triton's interpreter (TRITON_INTERPRET=1 when this file was imported).
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)
MAX_HEAD_DIM = 256
BLOCKS_Q = (1, 16, 32, 64, 128)
BLOCKS_K = (16, 32, 64, 128)
#: Maxima that one step of the epilogue holds; half as many where the map has a row per query, whose
#: addresses take registers too.
CHUNK_CELLS = 8192


@dataclass(frozen=True)
class Launch:
    """How the kernel is compiled and started.

    Attributes:
        block_m: Query tokens per tile.
        block_n: Keys per step.
        warps: Warps per program.
        stages: Steps of the loop over the keys that are in flight.
        programs: Programs per multiprocessor.
        direct: Whether the maxima are stored by the threads that hold them, in PTX; NVIDIA only.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int
    direct: bool = False


#: By bytes per element and padded head dimension. Registers and shared memory of each: docs/kernels.md.
LAUNCHES = {
    (2, 64): Launch(128, 64, 8, 3, 1),
    (2, 128): Launch(128, 64, 8, 3, 1),
    (2, 256): Launch(64, 32, 8, 2, 1),
    # fp32 products run outside the tensor cores and hold their operands in registers.
    (4, 64): Launch(64, 32, 8, 2, 2),
    (4, 128): Launch(32, 32, 8, 2, 2),
    (4, 256): Launch(16, 16, 8, 2, 2),
}


def launch_of(head_dim: int, num_queries: int, itemsize: int) -> Launch:
    """Choose the launch of a call from `LAUNCHES`; few queries need no more than a small tile.

    Args:
        head_dim: ``D``.
        num_queries: ``Tq``.
        itemsize: Bytes per element of q, k and v.
    """
    launch = LAUNCHES[itemsize, max(64, _power_of_two(head_dim))]
    # A product needs 16 rows at least.
    return replace(launch, block_m=min(launch.block_m, max(16, _power_of_two(num_queries))))


def unsupported(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
) -> list[str]:
    """Return the reasons why this backend cannot run."""
    if q.device.type != "cuda" and not (INTERPRETED and q.device.type == "cpu"):
        return ["it needs a GPU"]
    if triton is None:
        return ["triton is not installed; `pip install triton` brings it"]
    reasons = []
    if q.dtype not in DTYPES:
        reasons.append(
            f"it computes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"
        )
    elif INTERPRETED and q.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        reasons.append(f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[3]}")
    for name, size, allowed in zip(("query", "KV"), block_size, (BLOCKS_Q, BLOCKS_K), strict=True):
        if size not in allowed:
            listed = ", ".join(map(str, allowed))
            reasons.append(f"{name} blocks must have one of {listed} tokens, got {size}")
    tensors = {"q": q, "k": k, "v": v, "sinks": options.sinks}
    tensors |= {"cu_seqlens_q": options.cu_seqlens_q, "cu_seqlens_k": options.cu_seqlens_k}
    for name, x in tensors.items():
        if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1:
            reasons.append(f"the last dimension of {name} must be contiguous, its stride is {x.stride(-1)}")
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the output (None without v), the row-normalised block-max map, and lse (None unless asked)."""
    # A custom operator costs tens of microseconds, which only a compiler needs to spend.
    launch = _operator if torch.compiler.is_compiling() else _launch
    out, pooled, lse = launch(
        q,
        k,
        v,
        list(block_size),
        list(options.map_shape(q, k, block_size)),
        options.per_kv_head,
        options.scale,
        options.softcap,
        options.sinks,
        options.return_lse,
        options.cu_seqlens_q,
        options.cu_seqlens_k,
    )
    return None if v is None else out, pooled, lse if options.return_lse else None


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _chunk(launch: Launch, block_q: int, merge: int) -> int:
    """Columns of the map that one step of the epilogue makes."""
    limit = CHUNK_CELLS // 2 if block_q == 1 else CHUNK_CELLS
    return max(1, min(128, limit // (launch.block_m * merge)))


def _programs(device: torch.device, launch: Launch) -> int:
    if device.type == "cpu":
        return 2
    return launch.programs * torch.cuda.get_device_properties(device).multi_processor_count


def _outputs(
    q: Tensor, v: Tensor | None, shape: list[int], return_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(0) if v is None else torch.empty_like(q)
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return out, q.new_zeros(shape, dtype=torch.float32), lse


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    block_size: list[int],
    map_shape: list[int],
    per_kv_head: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Start the kernel."""
    if scale <= 0:
        # The kernel takes maxima and masks before it scales.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    out, pooled, lse = _outputs(q, v, map_shape, return_lse)
    batch, heads, num_queries, head_dim = q.shape
    kv_heads = k.shape[1]
    block_q, block_k = block_size
    launch = launch_of(head_dim, num_queries, q.element_size())
    block_d = max(_power_of_two(head_dim), 16)
    sequences = 0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    rows = num_blocks(num_queries, max(block_q, launch.block_m)) + max(0, sequences - 1)
    items = batch * (kv_heads if per_kv_head else heads) * rows
    programs = min(items, _programs(q.device, launch))
    cell = min(block_k, launch.block_n)
    cells = num_blocks(k.shape[2], launch.block_n) * (launch.block_n // cell)
    scratch = torch.empty(programs * cells * launch.block_m, dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    copies = copied(launch.block_n, block_d, k, v)
    values = k if v is None else v
    # Triton launches on the current device. A tensor that is not used still needs a pointer.
    with torch.cuda.device_of(q):
        pooled_kernel[(programs,)](
            q,
            k,
            values,
            *(copies or (k, values)),
            out,
            pooled,
            lse,
            scratch,
            counter,
            counter if sinks is None else sinks,
            counter if cu_seqlens_q is None else cu_seqlens_q,
            counter if cu_seqlens_k is None else cu_seqlens_k,
            *q.stride()[:3],
            *k.stride()[:3],
            *values.stride()[:3],
            *(q if v is None else out).stride()[:3],
            items,
            rows,
            map_shape[2],
            map_shape[3],
            cells,
            num_queries,
            k.shape[2],
            sequences,
            scale,
            0.0 if softcap is None else softcap,
            HEADS=heads,
            KV_HEADS=kv_heads,
            PER_KV_HEAD=per_kv_head,
            D=head_dim,
            BLOCK_D=block_d,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            CHUNK=_chunk(launch, block_q, block_k // cell),
            DIRECT=launch.direct and q.is_cuda and torch.version.hip is None,
            COPIES=copies is not None,
            HAS_V=v is not None,
            SOFTCAP=softcap is not None,
            SINKS=sinks is not None,
            LSE=return_lse,
            SEQUENCES=_power_of_two(sequences) if sequences else 0,
            STAGES=launch.stages,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return out, pooled, lse


_operator = torch.library.custom_op("seerattention::pooled_triton", _launch, mutates_args=())


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: list[int], map_shape: list[int], per_kv_head: bool,
    scale: float, softcap: float | None, sinks: Tensor | None, return_lse: bool, *cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(q, v, map_shape, return_lse)
