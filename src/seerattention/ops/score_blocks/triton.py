"""Scores and their gradients in Triton: between the passes only block scores and winning pairs exist.

The forward kernel keeps, beside each block score, which pair of sub-blocks it came from: a byte. Backward
needs no product of queries and keys then and cannot disagree with forward about the winner; it multiplies
the gradients, placed where that pair won, by the summaries. Nothing is added up out of order, so results
are the same every time. Design and floor: docs/kernels.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from seerattention.ops.language import padded, products, unsupported_dtype, unsupported_here
from seerattention.ops.launch import Launch, width
from seerattention.ops.options import ScoreOptions
from seerattention.ops.score_blocks._sub_blocks import largest_shares
from seerattention.ops.score_blocks._triton_kernel import back, score
from seerattention.rows import Rows, num_blocks

#: By what `width` says; of the kernel that scores, and of those that send gradients back.
LAUNCHES = {
    "narrow": {"score": Launch(64, 64, 4, 2, resident=2), "back": Launch(64, 64, 4, 3)},
    "wide": {"score": Launch(64, 32, 8, 1), "back": Launch(32, 32, 8, 1)},
}

#: What query summaries give blocks is compared in slices of at most this many bytes.
SLICE_BYTES = 256 * 2**20


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
    """Return the scores. Of shares, a slice of rows is computed again in the backward pass."""
    if not options.shares:
        return _products(queries, keys, options)
    subs, learns = options.sub_blocks[0], torch.is_grad_enabled()
    down, across = num_blocks(queries.shape[2], subs), num_blocks(keys.shape[2], options.sub_blocks[1])
    step = max(1, SLICE_BYTES // (4 * queries.shape[0] * queries.shape[1] * subs * across))
    parts = []
    for start in range(0, down, step):
        part = queries[:, :, start * subs : (start + step) * subs]
        args = part, keys, options, start
        again = learns and step < down
        parts.append(
            checkpoint(_shares, *args, use_reentrant=False, preserve_rng_state=False)
            if again
            else _shares(*args)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _shares(queries: Tensor, keys: Tensor, options: ScoreOptions, first: int) -> Tensor:
    """Return the largest shares of the rows of blocks from ``first`` on, whose summaries are given."""
    subs_q, subs_k = options.sub_blocks
    one = replace(options, shares=False, sub_blocks=(1, subs_k))
    if options.rows is None:
        return largest_shares(_products(queries, keys, one), subs_q)
    # Every query summary is a block of its own.
    size, block_k = options.size[0], options.block_size[1]
    past, tokens = options.rows.first + first * options.block_size[0], queries.shape[2] * size
    one = replace(one, rows=Rows.at(past, tokens), block_size=(size, block_k))
    products, count = _products(queries, keys, one, exact=True), queries.shape[2]
    block = block_k * torch.arange(products.shape[3], device=queries.device)
    # Where summaries end, and where blocks of them do.
    ends = past + size * torch.arange(1, count + 1, device=queries.device)
    last = past + size * torch.arange(subs_q, count + subs_q, subs_q, device=queries.device).clamp(max=count)
    shares = largest_shares(products.masked_fill(block >= ends[:, None], float("-inf")), subs_q)
    return shares.masked_fill(block >= last[:, None], 0)


def _products(queries: Tensor, keys: Tensor, options: ScoreOptions, *, exact: bool = False) -> Tensor:
    """Return the largest products; with ``exact`` among the summaries of keys that begin by a row's end."""
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad):
        return _Score.apply(queries, keys, options, exact)  # type: ignore[no-any-return]
    return _forward(queries.contiguous(), keys.contiguous(), options, keep=False, exact=exact)[0]


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, options: ScoreOptions, exact: bool) -> Tensor:
        queries, keys = queries.contiguous(), keys.contiguous()
        scores, winners = _forward(queries, keys, options, keep=True, exact=exact)
        ctx.save_for_backward(queries, keys, winners)
        ctx.options = options
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, winners = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        return *_backward(gradient.contiguous(), queries, keys, winners, wanted, ctx.options), None, None


def _forward(
    queries: Tensor, keys: Tensor, options: ScoreOptions, *, keep: bool, exact: bool
) -> tuple[Tensor, Tensor | None]:
    """Return scores and, if ``keep``, the number ``i * sub_blocks[1] + j`` of each one's winning pair."""
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
            EXACT=exact,
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
