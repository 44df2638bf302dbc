"""Hopper GPUs: tokens by TMA, pools in registers, products by wgmma; one program per multiprocessor.

The kernel is in ``kernels/hopper.py``; docs/kernels.md has its design and its measurements.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.language import unsupported_on_hopper
from seerattention.ops.options import SummaryOptions, pool_places
from seerattention.ops.tma import aligned, can_copy
from seerattention.rows import num_blocks

kernel: Any = None
with contextlib.suppress(ImportError):
    kernel = importlib.import_module("seerattention.ops.summarise_blocks.kernels.hopper")

#: Numbers of a token and of a summary, and tokens per block, that it takes.
HEAD_DIMS, DIMS, SIZES = (64, 128), (16, 32, 64, 128), (2, 4, 8, 16)

#: Blocks of an item; numbers of a token and places within a block in a part, at most.
ROWS, NUMBERS, PLACES = 64, 64, 4

#: Tokens, those of all heads counted, below which Triton's kernel is as fast: 8,192 of 32 heads.
LEAST_TOKENS = 1 << 18

#: Shared memory of a program: 227 KiB, less what barriers and sums of threads take.
SHARED_BYTES = 225 * 1024


def unsupported(x: Tensor, options: SummaryOptions) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_on_hopper(x.device, options.dtype, kernel)
    weight = options.weight
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight)):
        reasons.append("it has no backward; use backend='reference' for gradients")
    if options.merge > 1:
        reasons.append("it does not merge heads")
    if x.dtype != options.dtype:
        reasons.append(f"it computes in the tokens' dtype, {x.dtype}")
    if x.shape[3] not in HEAD_DIMS:
        reasons.append(f"it takes heads of {HEAD_DIMS} numbers, not {x.shape[3]}")
    if options.size not in SIZES:
        reasons.append(f"it takes blocks of {SIZES} tokens, not {options.size}")
    if x.shape[0] * x.shape[1] * x.shape[2] < LEAST_TOKENS:
        reasons.append(f"of fewer than {LEAST_TOKENS:,} tokens of all heads it is no faster than triton")
    if not can_copy(x):
        reasons.append("x must be 16-byte aligned with a contiguous last dimension")
    if weight is None:
        reasons.append("it does nothing without a projection")
    else:
        if weight.shape[0] != x.shape[1]:
            reasons.append("it projects a head once")
        if weight.shape[2] not in DIMS:
            reasons.append(f"it takes summaries of {DIMS} numbers, not {weight.shape[2]}")
        held = weight.shape[1] * weight.shape[2] * weight.element_size()
        # A consumer gives parts back once it has multiplied 64 numbers of all places.
        if stages(options.size, held, weight.shape[2]) < options.size // PLACES:
            reasons.append(f"shared memory has no room for blocks of {options.size} tokens beside weights")
        if not aligned(weight):
            reasons.append("weight must be 16-byte aligned")
    if options.norm is not None:
        reasons.append("it does not normalise")
    if options.rounded_to not in (None, torch.float8_e4m3fn):
        reasons.append(f"it rounds to float8_e4m3fn, not to {options.rounded_to}")
    if options.rows is not None:
        reasons.append("it takes no packed sequences")
    return reasons


def run(x: Tensor, options: SummaryOptions) -> Tensor:
    """Return the summaries, ``[B, H, N, E]``."""
    cos, sin = options.rotary or (None, None)
    assert options.weight is not None
    # An operator of torch costs tens of microseconds a call; only torch.compile needs one.
    start = summarise_op if torch.compiler.is_compiling() else summarise
    return start(x, options.size, " ".join(options.pools), options.weight, cos, sin, options.out_dtype)


def summarise(
    x: Tensor,
    size: int,
    pools: str,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel; arguments as those of `run`, pools in one text, and the result's dtype."""
    out = _empty(x, size, pools, weight, dtype)
    (batch, heads, tokens, width), (blocks, dim) = x.shape, out.shape[2:]
    if out.numel() == 0:
        return out
    # A short last block is summarised with the item before it.
    tiles = max(1, num_blocks(tokens // size, ROWS))
    items = batch * heads * tiles
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    with torch.cuda.device_of(x):
        kernel.summarise[(min(items, processors),)](
            kernel.describe_tokens(x, size),
            kernel.describe_matrices(weight.contiguous()),
            x,
            *x.stride()[:3],
            tokens,
            None if cos is None else cos.contiguous(),
            None if sin is None else sin.contiguous(),
            0 if cos is None or cos.shape[0] == 1 else blocks,
            out,
            items,
            tiles,
            heads,
            SIZE=size,
            D=width,
            POOLS=pool_places(pools.split()),
            STAGES=stages(size, weight.shape[1] * dim * weight.element_size(), dim),
            num_warps=4,
        )
    return out


def stages(size: int, held: int, dim: int) -> int:
    """Return how many parts shared memory has room for.

    Args:
        size: Tokens per block.
        held: Bytes of a head's matrix.
        dim: Numbers of a summary; those of an item change places by shared memory.
    """
    part = min(size, PLACES) * ROWS * NUMBERS * 2
    return min(16, (SHARED_BYTES - held - ROWS * dim * 2) // part)


def _empty(x: Tensor, size: int, pools: str, weight: Tensor, *rest: Any) -> Tensor:
    shape = x.shape[0], x.shape[1], num_blocks(x.shape[2], size), weight.shape[2]
    return x.new_empty(shape, dtype=rest[-1])


summarise_op = torch.library.custom_op(
    "seerattention::summarise_blocks_on_hopper", summarise, mutates_args=()
)
summarise_op.register_fake(_empty)
