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

#: Shares are compared in slices whose products of all summaries would have at most this many bytes.
SLICE_BYTES = 256 * 2**20

#: Numbers that a program which compares products holds at a time.
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
        options, wanted, unit = ctx.options, ctx.needs_input_grad[:2], _unit(gradient, queries.dtype)
        scale = options.scale if unit is None else options.scale * unit
        of_queries, of_keys = (torch.zeros_like(x, dtype=torch.float32) for x in (queries, keys))
        subs_k, group = options.sub_blocks[1], queries.shape[1] // keys.shape[1]
        for rows, subs, one in _slices(queries, keys, options):
            part = queries[:, :, subs].contiguous()
            largest, pairs = _forward(part, keys, one, keep=True)
            given = (x.contiguous() for x in (gradient[:, :, rows], winners[:, :, rows], sums[:, :, subs]))
            spread = part.new_zeros(*part.shape[:3], keys.shape[2])
            more = {"SUBS_K": subs_k, "SUBS_K_PAD": power_of_two(subs_k)}
            _over_rows(
                unshare, largest, options, one, pairs, *given, unit, spread, key_subs=keys.shape[2], **more
            )
            # The heads of a group behind one another.
            spread, part = (x.view(-1, group * x.shape[2], x.shape[3]) for x in (spread, part))
            if wanted[0]:
                of_queries[:, :, subs] = _product(spread, keys.flatten(0, 1)).view(
                    of_queries[:, :, subs].shape
                )
            if wanted[1]:
                of_keys += _product(spread.mT, part).view_as(keys)
        scaled = ((x * scale).to(keys.dtype) for x in (of_queries, of_keys))
        return *(x if asked else None for x, asked in zip(scaled, wanted, strict=True)), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return products of matrices in fp32, ``[n, i, j] @ [n, j, k]``."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _slices(
    queries: Tensor, keys: Tensor, options: ScoreOptions
) -> Iterator[tuple[slice, slice, ScoreOptions]]:
    """Return slices of rows of blocks and of their summaries, and how summaries are scored as rows."""
    (subs_q, subs_k), (batch, heads, count) = options.sub_blocks, queries.shape[:3]
    row_bytes = queries.element_size() * batch * heads * subs_q * keys.shape[2]
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
    """Return scores and, if ``keep``, the number of the query summary of each and what makes its share.

    That is of every summary the largest product and the logarithm of the sum of all relative to it, fp32
    ``[B, H, Sq, 2]``.
    """
    subs_q, subs_k = options.sub_blocks
    across = num_blocks(keys.shape[2], subs_k)
    kind = torch.uint8 if subs_q <= 256 else torch.int16
    found: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for rows, subs, one in _slices(queries, keys, options):
        largest = _forward(queries[:, :, subs].contiguous(), keys, one, keep=False)[0]
        scores = largest.new_zeros(*largest.shape[:2], rows.stop - rows.start, across)
        winners = torch.zeros_like(scores, dtype=kind) if keep else None
        sums = largest.new_empty(*largest.shape[:3], 2) if keep else None
        _over_rows(share, largest, options, one, scores, winners, sums, KEEP=keep)
        found.append((scores, winners, sums))
    if len(found) == 1:
        return found[0]
    scores, *others = zip(*found, strict=True)
    winners, sums = (torch.cat(parts, 2) if keep else None for parts in others)
    return torch.cat(scores, 2), winners, sums


def _over_rows(
    kernel: Any,
    largest: Tensor,
    options: ScoreOptions,
    one: ScoreOptions,
    *given: Any,
    **constants: Any,
) -> None:
    """Run a kernel of `_shares_kernel` on every row of blocks of a slice."""
    subs_q, (batch, heads, count, across) = options.sub_blocks[0], largest.shape
    down, held = num_blocks(count, subs_q), power_of_two(subs_q)
    cells = CHUNK_CELLS // (held * constants.get("SUBS_K_PAD", 1))
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
            CHUNK=min(power_of_two(across), max(16, cells)),
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
    winners: Tensor,
    wanted: tuple[bool, bool],
    options: ScoreOptions,
) -> list[Tensor | None]:
    launch, unit = LAUNCHES[width(queries)]["back"], _unit(gradient, queries.dtype)
    found: list[Tensor | None] = [None, None]
    sides = (keys, queries, launch.block_m), (queries, keys, launch.block_n)
    for place, (other, mine, blocks) in enumerate(sides):
        if not wanted[place]:
            continue
        out = torch.empty_like(mine)
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


def _unit(gradient: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what gradients are divided by before they are multiplied in fp16, None in other dtypes.

    Those of a mean over rows lie below its range: they are multiplied as shares of the largest, rounded to
    a power of two, so that dividing by it is exact.
    """
    if dtype != torch.float16:
        return None
    largest = torch.linalg.vector_norm(gradient, float("inf"))
    return torch.exp2(torch.frexp(largest).exponent.float()).clamp(min=2.0**-120)


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
