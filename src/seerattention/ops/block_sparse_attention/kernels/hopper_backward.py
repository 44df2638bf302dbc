"""Gradients on Hopper GPUs: those of keys and values by ``hopper_columns.py``, the rest as on any GPU."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention.kernels import backward as anywhere
from seerattention.ops.options import Options
from seerattention.ops.tma import can_copy
from seerattention.selection import BlockSelection

kernel: Any = None
with contextlib.suppress(ImportError):
    kernel = importlib.import_module("seerattention.ops.block_sparse_attention.kernels.hopper_columns")

#: Tokens per tile of queries and of keys.
TILE = 64
#: Tiles of a consumer's ring, by head dimension: as many as fit into 227 KiB beside keys and values.
STAGES = {64: 8, 128: 5}


def backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: BlockSelection,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `backward.backward` does, for what the Hopper forward takes."""
    if selection.bits.stride(3) != 1:
        selection = replace(selection, bits=selection.bits.contiguous())
    rest = grad_lse, q, k, v, out, lse, selection, options
    # A compiler could not see addresses when it chose the forward.
    if kernel is None or not all(can_copy(x) for x in (q, k, v)):
        return anywhere.backward(grad, *rest)
    if not can_copy(grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
    return anywhere.backward(grad, *rest, columns=keys)


def keys(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    delta: Tensor,
    selection: BlockSelection,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of keys and values, as `backward.keys` does.

    The first four must be as `can_copy` wants them, and the rest as `hopper.why_not` does.
    """
    dk = torch.empty_like(k)
    dv = torch.empty_strided(dk.shape, dk.stride(), dtype=v.dtype, device=v.device)
    bits, parts = selection.bits, selection.block_size[1] // TILE
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    counts, columns = anywhere.readers(q, k, selection, options)
    units = len(counts) * parts
    # Every consumer counts as a program.
    plan = anywhere.split_columns(counts, parts, 2 * processors)
    partial = torch.empty(16 * processors * TILE * q.shape[3], dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    kernel.attend_back[(processors,)](
        *kernel.describe((q, grad, k, v), (shift, delta)),
        dk,
        dv,
        *dk.stride()[:3],
        partial,
        bits,
        *anywhere.bit_strides(bits),
        counter,
        plan,
        units,
        k.shape[1],
        q.shape[2],
        k.shape[2],
        options.scale,
        D=q.shape[3],
        GROUP=q.shape[1] // k.shape[1],
        SHARED=q.shape[1] // bits.shape[1],
        BLOCK_Q=selection.block_size[0],
        PARTS=parts,
        STAGES=STAGES[q.shape[3]],
        num_warps=4,
    )
    anywhere.join_kernel[(units,)](
        dk,
        dv,
        plan,
        partial,
        # What sequences start at is not read.
        counter,
        counter,
        dk.stride()[:3],
        dv.stride()[:3],
        units,
        columns,
        q.shape[2],
        k.shape[2],
        0,
        KV_HEADS=k.shape[1],
        D=q.shape[3],
        BLOCK_D=q.shape[3],
        BLOCK_Q=selection.block_size[0],
        BLOCK_K=selection.block_size[1],
        BLOCK_N=TILE,
        SEQUENCES=0,
    )
    return dk, dv
