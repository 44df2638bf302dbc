"""A Triton kernel for any GPU that Triton compiles for.

Programs are persistent: each takes one query tile after another from a counter, expands the bits of
the tile's row into a list of its own in global memory, and runs over the list with the usual online
softmax. The host learns nothing of the selection. Design and roofline: docs/kernels.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention.kernels.backward import backward, bit_strides
from seerattention.ops.block_sparse_attention.kernels.forward import attention_kernel
from seerattention.ops.language import power_of_two, unsupported_attention
from seerattention.ops.launch import Launch, numbers, positive, starts
from seerattention.ops.options import Options
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

__all__ = ["backward", "run", "unsupported"]

BLOCKS_K = (16, 32, 64, 128)


#: By bytes per element and padded head dimension: launches for ever longer query blocks. Registers and
#: shared memory of each: docs/kernels.md.
LAUNCHES = {
    (2, 64): (Launch(64, 64, 4, 3, 3, 168), Launch(128, 64, 8, 3, 2)),
    (2, 128): (Launch(64, 64, 4, 3, 2), Launch(128, 64, 8, 3, 1)),
    (2, 256): (Launch(64, 32, 8, 2, 1),),
    # fp32 products run outside the tensor cores and hold their operands in registers.
    (4, 64): (Launch(64, 32, 8, 2, 2),),
    (4, 128): (Launch(32, 32, 8, 2, 2),),
    (4, 256): (Launch(16, 16, 8, 2, 2),),
}


def launch_of(head_dim: int, block_size: tuple[int, int], itemsize: int) -> Launch:
    """Choose the launch of a call from `LAUNCHES`.

    Args:
        head_dim: ``D``.
        block_size: Tokens per (query block, KV block).
        itemsize: Bytes per element of q, k and v.
    """
    choices = LAUNCHES[itemsize, max(64, power_of_two(head_dim))]
    launch = next((c for c in choices if c.block_m >= power_of_two(block_size[0])), choices[-1])
    return launch.within(*block_size)


def fits(page: int, block: int) -> bool:
    """Return whether every tile of a block's keys can lie within one page."""
    return page % block == 0 or (page >= BLOCKS_K[0] and block % page == 0)


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    tensors = {"k": k, "v": v, "selection.bits": selection.bits, "sinks": options.sinks}
    reasons = unsupported_attention(q, **tensors, **options.packed_starts, pages=options.pages)
    if selection.block_size[1] not in BLOCKS_K:
        allowed = ", ".join(map(str, BLOCKS_K))
        reasons.append(f"KV blocks must have one of {allowed} tokens, got {selection.block_size[1]}")
    if options.pages is not None and not fits(k.shape[2], selection.block_size[1]):
        reasons.append(
            f"pages must hold whole blocks of {selection.block_size[1]} tokens, or {BLOCKS_K[0]} tokens or "
            f"more that divide one, got {k.shape[2]}"
        )
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    q, options = positive(q, options)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3] if options.return_lse else (0,), dtype=torch.float32)
    bits = selection.bits
    pages, columns, (block_q, block_k) = options.pages, selection.shape[3], selection.block_size
    page = 0 if pages is None else k.shape[2]
    launch = launch_of(q.shape[3], (block_q, min(block_k, page or block_k)), q.element_size())
    items = q.shape[0] * q.shape[1] * bits.shape[2] * num_blocks(block_q, launch.block_m)
    programs = min(items, launch.most_programs(q.device))
    # A program's list and its pages, and one entry more each, which are read ahead.
    entries = columns + 1 + (columns * num_blocks(block_k, page) + 1 if page else 0)
    scratch = torch.empty(programs * entries, dtype=torch.int32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    # Triton launches on the current device. A tensor that is not used still needs a pointer.
    with torch.cuda.device_of(q):
        attention_kernel[(programs,)](
            q,
            k,
            v,
            out,
            lse,
            bits,
            scratch,
            counter,
            counter if options.sinks is None else options.sinks,
            *starts(options, counter),
            pages,
            *(x.stride()[:3] for x in (q, k, v, out)),
            *bit_strides(bits),
            None if pages is None else pages.stride(0),
            items,
            bits.shape[2],
            columns,
            q.shape[2],
            options.rows.num_keys,
            *numbers(options),
            BIT_HEADS=bits.shape[1],
            PAGE=page,
            SINKS=options.sinks is not None,
            LSE=options.return_lse,
            **launch.constants(q, k, selection.block_size, options),
        )
    return out, lse if options.return_lse else None
