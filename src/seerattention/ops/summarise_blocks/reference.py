"""The specification: pool, project, normalise, rotate, each rounded to the summaries' dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.dispatch import runs_everything
from seerattention.ops.options import SummaryOptions
from seerattention.scorer import narrowed

unsupported = runs_everything


def run(x: Tensor, options: SummaryOptions) -> Tensor:
    """Return the summaries, ``[B, H, N, E]``: every packed sequence's as if it were alone."""
    made = _summarised(x, options)
    return made if options.rounded_to is None else narrowed(made, options.rounded_to)


def _summarised(x: Tensor, options: SummaryOptions) -> Tensor:
    size, pools, rows, rotary = options.size, options.pools, options.rows, options.rotary
    then = {"weight": options.weight, "merge": options.merge, "norm": options.norm, "eps": options.eps}
    if rows is None:
        return project_blocks(pool_blocks(x.to(options.dtype), size, pools), rotary=rotary, **then)
    parts = []
    for tokens, blocks in zip(rows.places(x.shape[2]), rows.places(x.shape[2], size), strict=True):
        if tokens.start < tokens.stop:
            turns = None if rotary is None else (rotary[0][:, blocks], rotary[1][:, blocks])
            pools_of_one = pool_blocks(x[:, :, tokens].to(options.dtype), size, pools)
            parts.append(project_blocks(pools_of_one, rotary=turns, **then))
    return torch.cat(parts, 2)


def project_blocks(
    summary: Tensor,
    *,
    weight: Tensor | None,
    merge: int = 1,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Project, normalise and rotate pools ``[B, H, N, len(pools) * D]``; arguments as `summarise_blocks`."""
    if merge > 1:
        summary = summary.unflatten(1, (-1, merge)).transpose(2, 3).flatten(3)
    if weight is not None:
        # One head of x may be projected for several heads.
        weight = weight.unflatten(0, (summary.shape[1], -1))
        summary = torch.einsum("bhni,hgio->bhgno", summary, weight).flatten(1, 2)
    if norm is not None:
        summary = F.rms_norm(summary, norm.shape, norm.to(summary.dtype), eps)
    return summary if rotary is None else rotate(summary, *rotary)


def pool_blocks(x: Tensor, size: int, pools: tuple[str, ...]) -> Tensor:
    """Summarise each block of tokens; a short last block is pooled over the tokens it has.

    Args:
        x: ``[B, H, T, D]``.
        size: Tokens per block.
        pools: Any of max, min, avg.

    Returns:
        ``[B, H, N, len(pools) * D]``, pools concatenated in the order given.

    Source: SeerAttention, section 3.1 (arXiv 2410.13276).
    """
    full = x.shape[2] // size * size
    blocks = [x[:, :, :full].unflatten(2, (-1, size))] if full else []
    if full < x.shape[2]:
        blocks.append(x[:, :, full:].unsqueeze(2))
    reduce = {"max": Tensor.amax, "min": Tensor.amin, "avg": Tensor.mean}
    return torch.cat([torch.cat([reduce[p](b, 3) for p in pools], -1) for b in blocks], 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[B, H, N, E]`` by the angles whose cosine and sine, ``[B or 1, N, E]``, are given."""
    cos, sin = cos[:, None].float(), sin[:, None].float()
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
