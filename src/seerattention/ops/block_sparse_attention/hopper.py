"""Hopper GPUs: TMA and wgmma, two query tiles per multiprocessor, lists read straight from the bits.

The kernel is in ``kernels/hopper.py``, that of the gradients of keys and values in
``kernels/hopper_columns.py``; docs/kernels.md has their design and their measurements.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention.kernels.hopper_backward import backward
from seerattention.ops.language import unsupported_on_hopper
from seerattention.ops.options import Options
from seerattention.ops.tma import can_copy
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

__all__ = ["backward", "run", "unsupported"]

kernel: Any = None
with contextlib.suppress(ImportError):
    kernel = importlib.import_module("seerattention.ops.block_sparse_attention.kernels.hopper")

LOG2E = 1.4426950408889634

#: Tokens per tile of queries and of keys: the rows that one warpgroup's wgmma computes.
TILE = 64
HEAD_DIMS = (64, 128)
#: Shared memory for tiles; a Hopper block may use 227 KiB, the barriers need less than 1 KiB.
RING_BYTES = 224 * 1024


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    return why_not(q, k, v, selection.block_size, options)


def why_not(q: Tensor, k: Tensor, v: Tensor, block_size: tuple[int, int], options: Options) -> list[str]:
    """Return the reasons why the kernel cannot run."""
    reasons = unsupported_on_hopper(q.device, q.dtype, kernel)
    if q.shape[3] not in HEAD_DIMS:
        reasons.append(f"head_dim must be one of {HEAD_DIMS}, got {q.shape[3]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not can_copy(x):
            reasons.append(f"{name} must be 16-byte aligned with a contiguous last dimension; copy it first")
    if not options.scale > 0:
        reasons.append(
            f"it takes maxima before it scales, so the scale must be positive, not {options.scale}"
        )
    if options.softcap is not None:
        reasons.append("it has no softcap")
    if options.packed:
        reasons.append("it takes no packed sequences")
    if options.pages is not None:
        reasons.append("it reads no block table, so keys must lie behind one another")
    if block_size[0] % TILE or block_size[1] % TILE:
        reasons.append(f"blocks must be multiples of {TILE} tokens, got {block_size}")
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``."""
    out, lse = start(q, k, v, selection.bits, selection.block_size, options)
    return out, lse if options.return_lse else None


def item_size(heads: int, kv_heads: int, sel_heads: int, block_queries: int) -> tuple[int, int]:
    """Return how many query heads and how many query tiles of each make an item of work.

    The two warpgroups of a multiprocessor take an item of two together: where both parts read the same list
    of the same KV head, each tile of K and V is loaded once for both. Such are the halves of a query block of
    128 tokens, and one tile of two neighbouring heads of a list.

    Args:
        heads: Query heads.
        kv_heads: KV heads.
        sel_heads: Lists per query block, a divisor of ``heads``.
        block_queries: Tokens per query block, a multiple of `TILE`.

    Returns:
        The heads and the tiles: (1, 2), (2, 1), or (1, 1) where nothing can be shared.
    """
    if block_queries % (2 * TILE) == 0:
        return 1, 2
    if heads // sel_heads % 2 == 0 and heads // kv_heads % 2 == 0:
        return 2, 1
    return 1, 1


def start(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    block_size: tuple[int, int],
    options: Options,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Start the kernel and return the output and its logarithms, empty unless asked for; fill ``shares``.

    Args:
        q: ``[B, Hq, Tq, D]`` and like ``k`` and ``v`` as `why_not` wants them.
        k: ``[B, Hk, Tk, D]``.
        v: ``[B, Hk, Tk, D]``.
        bits: int32 ``[1 or B, divisor of Hq, Nq, words]``, see `BlockSelection`.
        block_size: Tokens per (query block, KV block).
        options: The options.
        shares: Zeroed fp32 ``[B, Hq, ceil(Tq / 64), ceil(Tk / 64)]`` for the largest probability of every
            64 queries and 64 keys; all blocks must be selected then.
    """
    assert kernel is not None
    batch, heads, num_queries, dim = q.shape
    # In the order of q: where tokens come before heads, models join the heads of a token without a copy.
    out = torch.empty_like(q)
    lse = out.new_empty(q.shape[:3] if options.return_lse else (0,), dtype=torch.float32)
    item_heads, item_tiles = item_size(heads, k.shape[1], bits.shape[1], block_size[0])
    share = item_heads * item_tiles == 2
    tiles, tiles_k = num_blocks(num_queries, TILE), num_blocks(k.shape[2], TILE)
    items = batch * (heads // item_heads) * num_blocks(tiles, item_tiles)
    # A slot of a ring has two tiles.
    stages = RING_BYTES // (2 * TILE * dim * q.element_size()) // (1 if share else 2)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = min(processors, num_blocks(items, 1 if share else 2))
    # A kernel argument that is not used still needs a pointer.
    maxima = lse
    if shares is not None:
        maxima = torch.empty(programs, 2, tiles_k + 1, TILE, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device):
        kernel.attend[(programs,)](
            *(kernel.descriptor(x, TILE, kernel.NUMBERS.value) for x in (q, k, v)),
            out,
            # In vectors of a head; of a dimension with one entry the stride may be any number.
            *(s // dim for s in out.stride()[:3]),
            lse,
            out if options.sinks is None else options.sinks.float().contiguous(),
            maxima,
            lse if shares is None else shares,
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
            tiles_k,
            k.shape[2] - num_queries,
            num_queries,
            options.scale * LOG2E,
            D=dim,
            BLOCK_Q=block_size[0],
            PARTS=block_size[1] // TILE,
            STAGES=stages,
            WORDS=max(32, 1 << (bits.shape[3] - 1).bit_length()),
            ITEM_HEADS=item_heads,
            ITEM_TILES=item_tiles,
            LSE=options.return_lse,
            SINKS=options.sinks is not None,
            MAP=shares is not None,
            num_warps=4,
        )
    return out, lse
