"""A Triton kernel that returns attention and the map in one pass over the keys, on any GPU Triton knows.

Programs are persistent. An item is the rows of the map that one tile of queries makes (a query block longer
than a tile is several tiles; with one map per KV head, all heads of the group). A tile is the usual online
softmax; the largest score of every row and KV block, which the softmax takes anyway, goes to a scratch
that belongs to the program, or for mass the logarithm of the block's part of the softmax's sum. When the
softmax's denominators are known, the scratch is read back, turned into weights and pooled into rows of the
map. Design and roofline: docs/kernels.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.language import power_of_two, unsupported_attention
from seerattention.ops.launch import Launch, numbers, positive, starts
from seerattention.ops.options import PoolOptions
from seerattention.ops.pooled_attention._triton_kernel import pooled_kernel
from seerattention.ops.tma import tiles
from seerattention.rows import num_blocks

BLOCKS_Q = (1, 16, 32, 64, 128)
BLOCKS_K = (16, 32, 64, 128)
#: Cells that one step of the epilogue holds.
CHUNK_CELLS = 8192


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
    launch = LAUNCHES[itemsize, max(64, power_of_two(head_dim))]
    return launch.within(num_queries, launch.block_n)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_attention(q, k=k, v=v, sinks=options.sinks, **options.packed_starts)
    for name, size, allowed in zip(("query", "KV"), block_size, (BLOCKS_Q, BLOCKS_K), strict=True):
        if size not in allowed:
            listed = ", ".join(map(str, allowed))
            reasons.append(f"{name} blocks must have one of {listed} tokens, got {size}")
    if options.pool == "mass" and q.dtype == torch.float32:
        reasons.append("it rounds the logarithms of sums that float32 takes for mass more than float32 would")
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the output (None without v), the row-normalised map of blocks, and lse (None unless asked)."""
    q, options = positive(q, options)
    values = k if v is None else v
    out = q if v is None else torch.empty_like(q)
    pooled = q.new_zeros(options.map_shape(q, k, block_size), dtype=torch.float32)
    lse = q.new_empty(q.shape[:3] if options.return_lse else (0,), dtype=torch.float32)
    block_q, block_k = block_size
    launch = launch_of(q.shape[3], q.shape[2], q.element_size())
    rows = num_blocks(q.shape[2], max(block_q, launch.block_m)) + max(0, options.sequences - 1)
    items = q.shape[0] * pooled.shape[1] * rows
    programs = min(items, launch.most_programs(q.device))
    cell = min(block_k, launch.block_n)
    # Where the map has a row per query, addresses take registers too.
    held = CHUNK_CELLS // 2 if block_q == 1 else CHUNK_CELLS
    cells = num_blocks(k.shape[2], launch.block_n) * (launch.block_n // cell)
    scratch = torch.empty(programs * cells * launch.block_m, dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    described = tiles(launch, launch.block_n, k, values)
    # Triton launches on the current device. A tensor that is not used still needs a pointer.
    with torch.cuda.device_of(q):
        pooled_kernel[(programs,)](
            q,
            k,
            values,
            *(described or (k, values)),
            out,
            pooled,
            lse,
            scratch,
            counter,
            counter if options.sinks is None else options.sinks,
            *starts(options, counter),
            *(x.stride()[:3] for x in (q, k, values, out)),
            items,
            rows,
            pooled.shape[2],
            pooled.shape[3],
            cells,
            q.shape[2],
            k.shape[2],
            *numbers(options),
            PER_KV_HEAD=options.per_kv_head,
            MASS=options.pool == "mass",
            CHUNK=max(1, min(128, held // (launch.block_m * (block_k // cell)))),
            DIRECT=launch.direct and q.is_cuda and torch.version.hip is None,
            TMA=described is not None,
            HAS_V=v is not None,
            SINKS=options.sinks is not None,
            LSE=options.return_lse,
            **launch.constants(q, k, block_size, options),
        )
    return None if v is None else out, pooled, lse if options.return_lse else None
