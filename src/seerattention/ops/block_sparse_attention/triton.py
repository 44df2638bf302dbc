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
from seerattention.ops.language import (
    padded,
    power_of_two,
    unsupported_dtype,
    unsupported_here,
    unsupported_strides,
)
from seerattention.ops.launch import Launch
from seerattention.ops.options import Options
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

__all__ = ["backward", "run", "unsupported"]

MAX_HEAD_DIM = 256
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


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_here(q) + unsupported_dtype(q.dtype)
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        reasons.append(f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[3]}")
    if selection.block_size[1] not in BLOCKS_K:
        allowed = ", ".join(map(str, BLOCKS_K))
        reasons.append(f"KV blocks must have one of {allowed} tokens, got {selection.block_size[1]}")
    tensors = {"q": q, "k": k, "v": v, "selection.bits": selection.bits, "sinks": options.sinks}
    return reasons + unsupported_strides(**tensors, **options.starts)


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    # A custom operator costs tens of microseconds, which only a compiler needs to spend.
    launch = _operator if torch.compiler.is_compiling() else _launch
    out, lse = launch(
        q, k, v, selection.bits, list(selection.block_size), selection.shape[3], options.scale,
        options.softcap, options.sinks, options.return_lse, **options.starts,
    )  # fmt: skip
    return out, lse if options.return_lse else None


def _outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


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
    starts_q: Tensor | None,
    starts_k: Tensor | None,
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
    programs = min(items, launch.most_programs(q.device))
    # A program's list, and one entry more, which is read ahead.
    scratch = torch.empty(programs * (num_kv_blocks + 1), dtype=torch.int32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    sequences = 0 if starts_q is None else len(starts_q) - 1
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
            counter if sinks is None else sinks,
            counter if starts_q is None else starts_q,
            counter if starts_k is None else starts_k,
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            out.stride()[:3],
            *bit_strides(bits),
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
            BLOCK_D=padded(head_dim),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            SOFTCAP=softcap is not None,
            SINKS=sinks is not None,
            LSE=return_lse,
            SEQUENCES=power_of_two(sequences) if sequences else 0,
            **launch.constants(),
        )
    return out, lse


_operator = torch.library.custom_op("seerattention::block_sparse_triton", _launch, mutates_args=())


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, block_size: list[int], num_kv_blocks: int, scale: float,
    softcap: float | None, sinks: Tensor | None, return_lse: bool, *starts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(q, return_lse)
