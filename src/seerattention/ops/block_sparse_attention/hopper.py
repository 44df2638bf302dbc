"""Hopper GPUs: TMA and wgmma, two query tiles per multiprocessor, lists read straight from the bits.

The kernel is in ``_hopper_kernel.py``; docs/kernels.md has its design and its measurements.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention._options import Options
from seerattention.selection import BlockSelection, num_blocks

kernel: Any = None
with contextlib.suppress(ImportError):
    kernel = importlib.import_module("seerattention.ops.block_sparse_attention._hopper_kernel")

LOG2E = 1.4426950408889634

#: Tokens per tile of queries and of keys: the rows that one warpgroup's wgmma computes.
TILE = 64
HEAD_DIMS = (64, 128)
#: Shared memory for tiles; a Hopper block may use 227 KiB, the barriers need less than 1 KiB.
RING_BYTES = 224 * 1024


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = []
    if kernel is None:
        reasons.append("triton with the Gluon language (triton >= 3.6) is not installed")
    if q.device.type != "cuda":
        reasons.append("it needs a Hopper GPU")
    elif not _is_hopper(q.device):
        reasons.append(f"it needs a Hopper GPU (sm_90), this is {torch.cuda.get_device_name(q.device)}")
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"its tensor-core products take bfloat16 and float16, not {q.dtype}")
    if q.shape[3] not in HEAD_DIMS:
        reasons.append(f"head_dim must be one of {HEAD_DIMS}, got {q.shape[3]}")
    if selection.block_size[0] % TILE or selection.block_size[1] % TILE:
        reasons.append(f"blocks must be multiples of {TILE} tokens, got {selection.block_size}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [s * x.element_size() for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
        # A compiler cannot read addresses; there the descriptor asserts it.
        aligned = torch.compiler.is_compiling() or x.data_ptr() % 16 == 0
        if x.stride(3) != 1 or any(s % 16 for s in strides) or not all(strides) or not aligned:
            reasons.append(f"{name} must be 16-byte aligned with a contiguous last dimension; copy it first")
    if not options.scale > 0:
        reasons.append(
            f"it takes maxima before it scales, so the scale must be positive, not {options.scale}"
        )
    if options.softcap is not None:
        reasons.append("it has no softcap")
    if options.packed:
        reasons.append("it has no packed sequences")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        reasons.append("it has no backward; use backend='reference' for gradients")
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``."""
    # A custom operator costs tens of microseconds, which only a compiler needs to spend.
    launch = _operator if torch.compiler.is_compiling() else _launch
    out, lse = launch(
        q, k, v, selection.bits, *selection.block_size, options.scale, options.sinks, options.return_lse
    )
    return (out, lse) if options.return_lse else out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    sinks: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    assert kernel is not None
    batch, heads, num_queries, dim = q.shape
    out, lse = _outputs(q, with_lse)
    # Both warpgroups of a multiprocessor take halves of one query block where it has 128 tokens: they
    # read the same list, so each tile is loaded once for both.
    share = block_q % (2 * TILE) == 0
    tiles = num_blocks(num_queries, TILE)
    items = batch * heads * num_blocks(tiles, 2 if share else 1)
    stages = RING_BYTES // (TILE * dim * q.element_size()) // (1 if share else 2)
    with torch.cuda.device(q.device):
        kernel.attend[(min(_processors(q.device), num_blocks(items, 1 if share else 2)),)](
            *(kernel.descriptor(x, TILE) for x in (q, k, v)),
            out,
            lse,
            out if sinks is None else sinks.float().contiguous(),
            bits.contiguous(),
            torch.zeros(1, dtype=torch.int32, device=q.device),
            items,
            bits.shape[3],
            bits.shape[0],
            bits.shape[1],
            bits.shape[2],
            heads,
            k.shape[1],
            tiles,
            k.shape[2] - num_queries,
            num_queries,
            scale * LOG2E,
            D=dim,
            BLOCK_Q=block_q,
            PARTS=block_k // TILE,
            STAGES=stages,
            WORDS=max(32, 1 << (bits.shape[3] - 1).bit_length()),
            SHARE=share,
            LSE=with_lse,
            SINKS=sinks is not None,
            num_warps=4,
        )
    return out, lse


_operator = torch.library.custom_op("seerattention::block_sparse_hopper", _launch, mutates_args=())


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    sinks: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, with_lse)


# A bool, since some compilers of PyTorch cannot compare a constant tuple.
@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _outputs(q: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Allocate the output and, if wanted, its logarithms."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = q.shape[:3] if with_lse else (0,)
    return out, torch.empty(lse_shape, dtype=torch.float32, device=q.device)
