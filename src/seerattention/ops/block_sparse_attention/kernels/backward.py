"""Gradients by Triton kernels, whichever kernel the forward ran on.

Probabilities are computed anew from the logarithms that the forward kept: once row by row, for the
gradient of the queries, and once column by column, for those of keys and values, whose heads of a group
are added up within one program. Nothing is added up in an order that may change, so two runs agree bit
for bit. Design and floor: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention.kernels.backward_columns import (
    count_kernel,
    join_kernel,
    keys_kernel,
    plan_kernel,
)
from seerattention.ops.block_sparse_attention.kernels.backward_rows import queries_kernel, rows_kernel
from seerattention.ops.language import padded, power_of_two
from seerattention.ops.launch import Launch, numbers, starts
from seerattention.ops.options import Options
from seerattention.ops.tma import line, tiles
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

#: By bytes per element and padded head dimension. Registers and shared memory of each: docs/kernels.md.
QUERIES = {
    (2, 64): Launch(64, 64, 4, 3, 2),
    (2, 128): Launch(64, 64, 4, 2, 2),
    (2, 256): Launch(64, 32, 8, 2, 1),
    # fp32 products run outside the tensor cores, hold their operands in registers, and never wait for loads.
    (4, 64): Launch(32, 32, 8, 2, 2, tma=False),
    (4, 128): Launch(32, 32, 8, 2, 1, tma=False),
    (4, 256): Launch(16, 16, 8, 2, 1, tma=False),
}
KEYS = {
    (2, 64): Launch(64, 64, 4, 3, 2, 255),
    (2, 128): Launch(32, 64, 4, 4, 2, 255),
    (2, 256): Launch(16, 64, 8, 2, 1, 255),
    (4, 64): Launch(32, 32, 8, 2, 1, tma=False),
    (4, 128): Launch(16, 32, 8, 2, 1, 255, tma=False),
    (4, 256): Launch(16, 16, 16, 2, 1, 128, tma=False),
}
#: The same where registers are short: without TMA, whose work takes some, or with a softcap.
KEYS_TIGHT = KEYS | {
    (2, 64): Launch(32, 64, 4, 2, 2, 255),
    (2, 128): Launch(32, 64, 4, 2, 2, 255),
}
#: Queries per program of the first kernel, and to which a head's numbers are padded.
ROWS, TILE = 32, 128
#: Entries of a list below which no part of a column is worth the writing and adding up of its share.
FEWEST = 16
#: Columns that the plan's only program takes at a time.
PLANNED = 2048


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
    columns: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, and fp32 ``[B, Hq, Tq]`` with what sinks gain from each query.

    Args:
        grad: Gradient of the output, ``[B, Hq, Tq, D]``.
        grad_lse: Gradient of ``lse``.
        q: ``[B, Hq, Tq, D]``, as the forward got it, like what follows.
        k: ``[B, Hk, Tk, D]``.
        v: ``[B, Hk, Tk, D]``.
        out: The output.
        lse: fp32 ``[B, Hq, Tq]``, contiguous.
        selection: The blocks that were read.
        options: The options.
        columns: What makes the gradients of keys and values instead of `keys`, from the same arguments.
    """
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    # Triton launches on the current device.
    with torch.cuda.device_of(q):
        shift, delta = rows(grad, grad_lse.contiguous(), out, lse)
        dq = queries(grad, q, k, v, shift, delta, selection, options)
        dk, dv = (columns or keys)(grad, q, k, v, shift, delta, selection, options)
    return dq, dk, dv, delta[..., : q.shape[2]]


def rows(grad: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return what both other parts need of every query, shift and delta, each fp32 ``[B, Hq, padded]``.

    Heads are padded to whole tiles, so that a tile's numbers can be copied as they lie.
    """
    batch, heads, num_queries, dim = out.shape
    length = num_blocks(num_queries, TILE) * TILE
    shift, delta = (lse.new_empty(batch, heads, length) for _ in range(2))
    steps = length // ROWS
    rows_kernel[(batch * heads * steps,)](
        out,
        grad,
        lse,
        grad_lse,
        delta,
        shift,
        out.stride()[:3],
        grad.stride()[:3],
        num_queries,
        length,
        steps,
        HEADS=heads,
        D=dim,
        BLOCK_D=padded(dim),
        TILE=ROWS,
        EXACT=out.dtype == torch.float32,
    )
    return shift, delta


def queries(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    delta: Tensor,
    selection: BlockSelection,
    options: Options,
) -> Tensor:
    """Return the gradient of the queries, row by row of the selection."""
    launch = _launch_of(QUERIES, q, selection.block_size)
    dq = torch.empty_like(q)
    bits = selection.bits
    items = q.shape[0] * q.shape[1] * bits.shape[2] * num_blocks(selection.block_size[0], launch.block_m)
    programs = min(items, launch.most_programs(q.device))
    # A program's list, and one entry more, which is read ahead.
    scratch = torch.empty(programs * (selection.shape[3] + 1), dtype=torch.int32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    # A tile of keys may reach into the next sequence, whose values are none of this one's business.
    described = None if options.packed else tiles(launch, launch.block_n, k, v)
    queries_kernel[(programs,)](
        q,
        k,
        v,
        grad,
        *(described or (k, v)),
        dq,
        shift,
        delta,
        bits,
        scratch,
        counter,
        *starts(options, counter),
        *(x.stride()[:3] for x in (q, k, v, grad, dq)),
        *bit_strides(bits),
        items,
        bits.shape[2],
        selection.shape[3],
        q.shape[2],
        shift.shape[2],
        k.shape[2],
        *numbers(options),
        BIT_HEADS=bits.shape[1],
        TMA=described is not None,
        **launch.constants(q, k, selection.block_size, options),
    )
    return dq


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
    """Return the gradients of keys and values, column by column of the selection."""
    tight = options.softcap is not None
    launch = _launch_of(KEYS_TIGHT if tight else KEYS, q, selection.block_size)
    # A tile of queries must not reach into another row.
    whole = not options.packed and selection.block_size[0] % launch.block_m == 0
    described = tiles(launch, launch.block_m, q, grad) if whole else None
    if described is None:
        launch = _launch_of(KEYS_TIGHT, q, selection.block_size)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    bits = selection.bits
    programs = launch.most_programs(q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    places = starts(options, counter)
    constants = launch.constants(q, k, selection.block_size, options)
    counts, columns = readers(q, k, selection, options, constants["SEQUENCES"])
    parts = selection.block_size[1] // launch.block_n
    units, plan = len(counts) * parts, split_columns(counts, parts, programs)
    length = q.shape[1] // k.shape[1] * bits.shape[2] + 1
    scratch = torch.empty(programs * length, dtype=torch.int32, device=q.device)
    # A column that is split has more entries than a part may have: no more than 4 parts per program.
    partial = torch.empty(
        8 * programs * launch.block_n * padded(q.shape[3]), dtype=torch.float32, device=q.device
    )
    sizes = units, columns, q.shape[2]
    strides = dk.stride()[:3], dv.stride()[:3]
    keys_kernel[(programs,)](
        q,
        k,
        v,
        grad,
        *(described or (q, grad)),
        *(line(launch.block_m, x) if described else x for x in (shift, delta)),
        dk,
        dv,
        shift,
        delta,
        bits,
        scratch,
        counter,
        plan,
        partial,
        *places,
        *(x.stride()[:3] for x in (q, k, v, grad)),
        *strides,
        *bit_strides(bits),
        length,
        *sizes,
        shift.shape[2],
        k.shape[2],
        *numbers(options),
        BIT_HEADS=bits.shape[1],
        TMA=described is not None,
        **constants,
    )
    kept = ("KV_HEADS", "D", "BLOCK_D", "BLOCK_Q", "BLOCK_K", "BLOCK_N", "SEQUENCES")
    join_kernel[(units,)](
        dk,
        dv,
        plan,
        partial,
        *places,
        *strides,
        *sizes,
        k.shape[2],
        options.sequences,
        **{n: constants[n] for n in kept},
    )
    return dk, dv


def readers(
    q: Tensor, k: Tensor, selection: BlockSelection, options: Options, most_sequences: int = 0
) -> tuple[Tensor, int]:
    """Count what reads every KV block: (query head of the group, row of the selection) pairs.

    Returns:
        int32 ``[B * Hk * columns]``, and the number of columns of a KV head.
    """
    columns = num_blocks(k.shape[2], selection.block_size[1])
    # Every sequence ends in at most one short block.
    columns += max(0, options.sequences - 1)
    bits = selection.bits
    counts = torch.empty(q.shape[0] * k.shape[1] * columns, dtype=torch.int32, device=q.device)
    count_kernel[(len(counts),)](
        bits,
        counts,
        *starts(options, counts),
        *bit_strides(bits),
        columns,
        q.shape[2],
        k.shape[2],
        options.sequences,
        KV_HEADS=k.shape[1],
        GROUP=q.shape[1] // k.shape[1],
        SHARED=q.shape[1] // bits.shape[1],
        BLOCK_Q=selection.block_size[0],
        BLOCK_K=selection.block_size[1],
        SEQUENCES=most_sequences,
    )
    return counts, columns


def split_columns(counts: Tensor, tiles: int, programs: int) -> Tensor:
    """Split columns so that no part is more than half of what a program gets, without asking the device.

    Args:
        counts: int32, entries per KV block.
        tiles: Tiles per KV block, whose columns are equal; there are ``C`` in all.
        programs: How many share them, ``P``.

    Returns:
        The plan, int32 ``[5 C + 2 + 2 P]``: every column's first part, how many it has, and its first place
        in the workspace, if it has several, no place being ``4 P`` or later; then the number of parts, and
        the most entries of a part; every column's entries; and the column of every part.
    """
    units = len(counts) * tiles
    plan = torch.empty(5 * units + 2 + 2 * programs, dtype=torch.int32, device=counts.device)
    plan_kernel[(1,)](counts, plan, units, programs, FEWEST=FEWEST, TILES=tiles, CHUNK=PLANNED, num_warps=8)
    return plan


def _launch_of(launches: dict[tuple[int, int], Launch], x: Tensor, block_size: tuple[int, int]) -> Launch:
    return launches[x.element_size(), max(64, power_of_two(x.shape[3]))].within(*block_size)


def bit_strides(bits: Tensor) -> tuple[int, int, int]:
    """Return a selection's strides but for the words of a row; batch entries may share one selection."""
    return bits.stride(0) if bits.shape[0] > 1 else 0, bits.stride(1), bits.stride(2)
