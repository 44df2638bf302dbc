"""Scores and their gradients in Triton: between the passes only block scores and winning pairs exist.

The forward kernel keeps, beside each block score, which pair of sub-blocks it came from: a byte. Backward
needs no product of queries and keys then and cannot disagree with forward about the winner; it multiplies
the gradients, placed where that pair won, by the summaries. Nothing is added up out of order, so results
are the same every time. Design and floor: docs/kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seerattention.ops.language import (
    padded,
    power_of_two,
    products,
    unsupported_dtype,
    unsupported_here,
)
from seerattention.ops.launch import Launch, width
from seerattention.ops.options import ScoreOptions
from seerattention.ops.score_blocks._shares_kernel import share, unshare
from seerattention.ops.score_blocks._triton_kernel import back, score
from seerattention.rows import Rows, num_blocks

#: By what `width` says; of the kernel that scores, and of those that send gradients back.
LAUNCHES = {
    "narrow": {"score": Launch(64, 64, 4, 2, resident=2), "back": Launch(64, 64, 4, 3)},
    "wide": {"score": Launch(64, 32, 8, 1), "back": Launch(32, 32, 8, 1)},
}

#: What query summaries give blocks is compared in slices of at most this many bytes.
SLICE_BYTES = 256 * 2**20

#: Products that a program which compares them holds at a time.
CHUNK_CELLS = 8192


def unsupported(queries: Tensor, keys: Tensor, options: ScoreOptions) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_here(queries) + unsupported_dtype(queries.dtype)
    if queries.shape[-1] * queries.element_size() > 512:
        reasons.append("it takes summaries of up to 512 bytes")
    if math.prod(options.sub_blocks) > 2**15:
        reasons.append(f"it numbers up to 32768 pairs of sub-blocks, not {math.prod(options.sub_blocks)}")
    if options.scale <= 0:
        reasons.append(f"the scale must be positive, not {options.scale}")
    return reasons


def run(queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:
    """Return the scores."""
    learns = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    if learns:
        kind = _Shares if options.shares else _Score
        return kind.apply(queries, keys, options)  # type: ignore[no-any-return]
    forward = _shares if options.shares else _forward
    return forward(queries.contiguous(), keys.contiguous(), options, keep=False)[0]


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:
        queries, keys = queries.contiguous(), keys.contiguous()
        scores, winners = _forward(queries, keys, options, keep=True)
        ctx.save_for_backward(queries, keys, winners)
        ctx.options = options
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, winners = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        return *_backward(gradient.contiguous(), queries, keys, winners, wanted, ctx.options), None


class _Shares(torch.autograd.Function):
    """Shares of slices of rows; the products of a slice are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:
        queries, keys = queries.contiguous(), keys.contiguous()
        scores, winners, sums = _shares(queries, keys, options, keep=True)
        ctx.save_for_backward(queries, keys, winners, sums)
        ctx.options = options
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, winners, sums = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        # Those of keys are sums over slices.
        found = torch.zeros_like(queries), torch.zeros_like(keys, dtype=torch.float32)
        for rows, subs, one in _slices(queries, keys, ctx.options):
            part = queries[:, :, subs].contiguous()
            largest, pairs = _forward(part, keys, one, keep=True)
            given = (x.contiguous() for x in (gradient[:, :, rows], winners[:, :, rows], sums[:, :, subs]))
            _over_rows(unshare, largest, ctx.options, one, *given)
            of_queries, of_keys = _backward(largest, part, keys, pairs, wanted, one, torch.float32)
            if of_queries is not None:
                found[0][:, :, subs] = of_queries
            if of_keys is not None:
                found[1].add_(of_keys)
        return *(x.to(keys.dtype) if asked else None for x, asked in zip(found, wanted, strict=True)), None


def _slices(
    queries: Tensor, keys: Tensor, options: ScoreOptions
) -> Iterator[tuple[slice, slice, ScoreOptions]]:
    """Return slices of rows of blocks and of their summaries, and how summaries are scored as rows."""
    (subs_q, subs_k), count = options.sub_blocks, queries.shape[2]
    row_bytes = 4 * queries.shape[0] * queries.shape[1] * subs_q * num_blocks(keys.shape[2], subs_k)
    step, down = max(1, SLICE_BYTES // row_bytes), num_blocks(count, subs_q)
    for start in range(0, down, step):
        rows = slice(start, min(start + step, down))
        subs = slice(rows.start * subs_q, min(rows.stop * subs_q, count))
        one = replace(options, sub_blocks=(1, subs_k))
        if options.rows is not None:
            # Every query summary is a block of its own.
            size, past = options.size[0], options.rows.first + start * options.block_size[0]
            place = Rows.at(past, (subs.stop - subs.start) * size)
            one = replace(one, rows=place, block_size=(size, options.block_size[1]))
        yield rows, subs, one


def _shares(
    queries: Tensor, keys: Tensor, options: ScoreOptions, *, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return scores and, if ``keep``, the number of the query summary of each, and summaries' log-sums."""
    subs_q, subs_k = options.sub_blocks
    down, across = num_blocks(queries.shape[2], subs_q), num_blocks(keys.shape[2], subs_k)
    shape = *queries.shape[:2], down, across
    found: list[tuple[Tensor | None, ...]] = []
    for rows, subs, one in _slices(queries, keys, options):
        largest = _forward(queries[:, :, subs].contiguous(), keys, one, keep=False)[0]
        part = (*shape[:2], rows.stop - rows.start, across)
        scores = torch.zeros(part, dtype=torch.float32, device=queries.device)
        kind = torch.uint8 if subs_q <= 256 else torch.int16
        winners = scores.new_zeros(part, dtype=kind) if keep else None
        sums = scores.new_empty(largest.shape[:3]) if keep else None
        _over_rows(share, largest, options, one, scores, winners, sums, KEEP=keep)
        found.append((scores, winners, sums))
    scores, winners, sums = (
        parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, 2)
        for parts in zip(*found, strict=True)
    )
    assert scores is not None
    return scores, winners, sums


def _over_rows(
    kernel: Any, largest: Tensor, options: ScoreOptions, one: ScoreOptions, *given: Any, **constants: Any
) -> None:
    """Run a kernel of `_shares_kernel` on every row of blocks of a slice."""
    subs_q, (batch, heads, count, across) = options.sub_blocks[0], largest.shape
    down, held = num_blocks(count, subs_q), power_of_two(subs_q)
    with torch.cuda.device_of(largest):
        kernel[down, batch * heads](
            largest,
            *given,
            count,
            down,
            across,
            one.past or 0,
            SUBS=subs_q,
            SUBS_PAD=held,
            SIZE=one.block_size[0],
            BLOCK_K=one.block_size[1],
            CAUSAL=one.past is not None,
            CHUNK=min(power_of_two(across), max(16, CHUNK_CELLS // held)),
            **constants,
        )


def _forward(
    queries: Tensor, keys: Tensor, options: ScoreOptions, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return products and, if ``keep``, the number ``i * sub_blocks[1] + j`` of each one's winning pair.

    Where they are to be shares, of the block that a row ends in only summaries that begin by its end count.
    """
    subs_q, subs_k = options.sub_blocks
    shape = *queries.shape[:2], num_blocks(queries.shape[2], subs_q), num_blocks(keys.shape[2], subs_k)
    scores = torch.zeros(shape, dtype=torch.float32, device=queries.device)
    small = subs_q * subs_k <= 256
    winners = scores.new_empty(shape, dtype=torch.uint8 if small else torch.int16) if keep else None
    launch = LAUNCHES[width(queries)]["score"]
    tiles = num_blocks(shape[2], launch.block_m) * num_blocks(shape[3], launch.block_n)
    with torch.cuda.device_of(queries):
        score[shape[0] * shape[1], tiles](
            queries,
            keys,
            scores,
            winners,
            *_numbers(queries, keys, scores, options),
            EXACT=options.shares and options.rows is not None,
            KEEP=keep,
            RESIDENT=math.gcd(subs_q, launch.resident),
            PRECISION=products(queries),
            **_constants(queries, keys, options, launch),
        )
    return scores, winners


def _backward(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    winners: Tensor | None,
    wanted: tuple[bool, bool],
    options: ScoreOptions,
    dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """Return the gradients that are wanted, in ``dtype`` or that of what they are of."""
    launch = LAUNCHES[width(queries)]["back"]
    unit = None
    if queries.dtype == torch.float16:
        # Gradients of a mean over rows lie below fp16's range: they are multiplied as shares of the
        # largest, rounded to a power of two, so that dividing by it is exact.
        largest = torch.linalg.vector_norm(gradient, float("inf"))
        unit = torch.exp2(torch.frexp(largest).exponent.float()).clamp(min=2.0**-120)
    found: list[Tensor | None] = [None, None]
    sides = (keys, queries, launch.block_m), (queries, keys, launch.block_n)
    for place, (other, mine, blocks) in enumerate(sides):
        if not wanted[place]:
            continue
        out = torch.empty_like(mine, dtype=dtype)
        tiles = num_blocks(gradient.shape[2 + place], blocks) * options.sub_blocks[place]
        with torch.cuda.device_of(queries):
            back[mine.shape[0] * mine.shape[1], tiles](
                gradient,
                winners,
                other,
                unit,
                out,
                *_numbers(queries, keys, gradient, options),
                TO_KEYS=place == 1,
                **_constants(queries, keys, options, launch),
            )
        found[place] = out
    return found


def _numbers(queries: Tensor, keys: Tensor, scores: Tensor, options: ScoreOptions) -> tuple[float, ...]:
    return queries.shape[2], keys.shape[2], *scores.shape[2:], options.past or 0, options.scale


def _constants(queries: Tensor, keys: Tensor, options: ScoreOptions, launch: Launch) -> dict[str, Any]:
    dim = queries.shape[3]
    return {
        "GROUP": queries.shape[1] // keys.shape[1],
        "E": dim,
        "E_PAD": padded(dim),
        "SUBS_Q": options.sub_blocks[0],
        "SUBS_K": options.sub_blocks[1],
        "BLOCK_Q": options.block_size[0],
        "BLOCK_K": options.block_size[1],
        "CAUSAL": options.past is not None,
        **launch.tile(),
    }
