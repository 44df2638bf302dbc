"""Scores and their gradients in Triton: between the passes only block scores and winning pairs exist.

The forward kernel keeps, beside each block score, which pair of sub-blocks it came from: a byte. Backward
needs no product of queries and keys then and cannot disagree with forward about the winner; it multiplies
the gradients, placed where that pair won, by the summaries. Nothing is added up out of order, so results
are the same every time. Design and floor: docs/kernels.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seerattention.ops.language import padded, products, unsupported_dtype, unsupported_here
from seerattention.ops.score_blocks._triton_kernel import back_to_keys, back_to_queries, score
from seerattention.rows import Rows, num_blocks

#: Launch settings: query blocks and KV blocks of a tile, summaries per query block that the forward kernel
#: holds in shared memory at a time, and Triton's own. ``wide`` is for fp32 and summaries of more than 256
#: bytes.
LAUNCH: dict[str, dict[str, dict[str, int]]] = {
    "narrow": {
        "score": {"ROWS": 64, "COLUMNS": 64, "RESIDENT": 2, "num_warps": 4, "num_stages": 2},
        "back": {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 3},
    },
    "wide": {
        "score": {"ROWS": 64, "COLUMNS": 32, "RESIDENT": 1, "num_warps": 8, "num_stages": 1},
        "back": {"ROWS": 32, "COLUMNS": 32, "num_warps": 8, "num_stages": 1},
    },
}


def unsupported(
    queries: Tensor,
    keys: Tensor,
    sub_blocks: tuple[int, int],
    scale: float,
    rows: Rows | None,
    block_size: tuple[int, int],
) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_here(queries) + unsupported_dtype(queries.dtype)
    if queries.shape[-1] * queries.element_size() > 512:
        reasons.append("it takes summaries of up to 512 bytes")
    if math.prod(sub_blocks) > 2**15:
        reasons.append(f"it numbers up to 32768 pairs of sub-blocks, not {math.prod(sub_blocks)}")
    if scale <= 0:
        reasons.append(f"the scale must be positive, not {scale}")
    return reasons


def run(
    queries: Tensor,
    keys: Tensor,
    sub_blocks: tuple[int, int],
    scale: float,
    rows: Rows | None,
    block_size: tuple[int, int],
) -> Tensor:
    """Return the scores."""
    options = sub_blocks, scale, None if rows is None else rows.first, block_size
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad):
        return _Score.apply(queries, keys, *options)  # type: ignore[no-any-return]
    return _forward(queries.contiguous(), keys.contiguous(), *options, keep=False)[0]


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        *options: Any,
    ) -> Tensor:
        queries, keys = queries.contiguous(), keys.contiguous()
        scores, winners = _forward(queries, keys, *options, keep=True)
        ctx.save_for_backward(queries, keys, winners)
        ctx.options = options
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, winners = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        found = _backward(gradient.contiguous(), queries, keys, winners, wanted, *ctx.options)
        return *found, *(None for _ in ctx.options)


def _forward(
    queries: Tensor,
    keys: Tensor,
    sub_blocks: tuple[int, int],
    scale: float,
    past: int | None,
    block_size: tuple[int, int],
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return scores and, if ``keep``, the number ``i * sub_blocks[1] + j`` of each one's winning pair.

    ``past`` are the keys before the first query; None scores every pair.
    """
    shape = _shape(queries, keys, sub_blocks)
    scores = torch.zeros(shape, dtype=torch.float32, device=queries.device)
    small = math.prod(sub_blocks) <= 256
    winners = scores.new_empty(shape, dtype=torch.uint8 if small else torch.int16) if keep else None
    options = dict(LAUNCH[_kind(queries)]["score"])
    options["RESIDENT"] = math.gcd(sub_blocks[0], options["RESIDENT"])
    tiles = num_blocks(shape[2], options["ROWS"]) * num_blocks(shape[3], options["COLUMNS"])
    with torch.cuda.device_of(queries):
        score[shape[0] * shape[1], tiles](
            queries,
            keys,
            scores,
            winners,
            *_arguments(queries, keys, shape, past),
            scale,
            KEEP=keep,
            PRECISION=products(queries),
            **_constants(queries, keys, sub_blocks, past, block_size),
            **options,
        )
    return scores, winners


def _backward(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    winners: Tensor,
    wanted: tuple[bool, bool],
    sub_blocks: tuple[int, int],
    scale: float,
    past: int | None,
    block_size: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None]:
    shape = _shape(queries, keys, sub_blocks)
    options = LAUNCH[_kind(queries)]["back"]
    unit = None
    if queries.dtype == torch.float16:
        # Gradients of a mean over rows lie below fp16's range: they are multiplied as shares of the
        # largest, rounded to a power of two, so that dividing by it is exact.
        largest = torch.linalg.vector_norm(gradient, float("inf"))
        unit = torch.exp2(torch.frexp(largest).exponent.float()).clamp(min=2.0**-120)
    found: list[Tensor | None] = [None, None]
    back = ((back_to_queries, keys, queries, "ROWS"), (back_to_keys, queries, keys, "COLUMNS"))
    for place, (kernel, other, mine, side) in enumerate(back):
        if not wanted[place]:
            continue
        out = torch.empty_like(mine)
        tiles = num_blocks(shape[2 + place], options[side]) * sub_blocks[place]
        with torch.cuda.device_of(queries):
            kernel[mine.shape[0] * mine.shape[1], tiles](
                gradient,
                winners,
                other,
                unit,
                out,
                *_arguments(queries, keys, shape, past),
                scale,
                **_constants(queries, keys, sub_blocks, past, block_size),
                **options,
            )
        found[place] = out
    return found[0], found[1]


def _shape(queries: Tensor, keys: Tensor, sub_blocks: tuple[int, int]) -> tuple[int, int, int, int]:
    rows, columns = num_blocks(queries.shape[2], sub_blocks[0]), num_blocks(keys.shape[2], sub_blocks[1])
    return queries.shape[0], queries.shape[1], rows, columns


def _kind(queries: Tensor) -> str:
    return "narrow" if queries.element_size() == 2 and queries.shape[3] <= 128 else "wide"


def _arguments(
    queries: Tensor, keys: Tensor, shape: tuple[int, int, int, int], past: int | None
) -> tuple[int, int, int, int, int]:
    return queries.shape[2], keys.shape[2], shape[2], shape[3], past or 0


def _constants(
    queries: Tensor,
    keys: Tensor,
    sub_blocks: tuple[int, int],
    past: int | None,
    block_size: tuple[int, int],
) -> dict[str, Any]:
    dim = queries.shape[3]
    return {
        "GROUP": queries.shape[1] // keys.shape[1],
        "E": dim,
        "E_PAD": padded(dim),
        "SUBS_Q": sub_blocks[0],
        "SUBS_K": sub_blocks[1],
        "BLOCK_Q": block_size[0],
        "BLOCK_K": block_size[1],
        "CAUSAL": past is not None,
    }
