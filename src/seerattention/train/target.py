"""What the gates learn from: targets, the rows that count, and what a sparse selection would catch."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.policies import TopK
from seerattention.selection import causal_blocks

#: Share of the query-block rows, from the start, that objectives leave out: they see few blocks.
SKIPPED_ROWS = 0.25

#: Rows on which recall is measured while training: all would cost a top-k of the whole map in every layer.
RECALL_ROWS = 64


def counted_rows(
    target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return target, scores and the causally valid blocks of the rows that count.

    Args:
        target: fp32 ``[B, H, N, N]`` from `pooled_attention`; rows sum to 1.
        scores: fp32 ``[B, H, N, N]`` from `AttnGate`, before softmax.
        block_size: Tokens per (query block, KV block).
        num_tokens: Tokens of the sequence.

    Returns:
        Target and scores ``[B, H, R, N]`` and bool ``[R, N]``: the last ``R`` rows. The first quarter
        is left out, as in the published code.

    Raises:
        ValueError: If target and scores differ in shape.
    """
    if target.shape != scores.shape:
        raise ValueError(
            f"target {list(target.shape)} and scores {list(scores.shape)} must have one shape; gates with "
            "one score per KV head learn from pooled_attention(..., per_kv_head=True)"
        )
    valid = causal_blocks(num_tokens, num_tokens, block_size, scores.device)
    first = int(SKIPPED_ROWS * scores.shape[2])
    return target[:, :, first:], scores[:, :, first:], valid[first:]


def target_recall(
    target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int, density: float
) -> float:
    """Return the share of the target's mass in the blocks that ``TopK(density)`` takes by these scores.

    Args:
        target: fp32 ``[B, H, N, N]``; rows sum to 1.
        scores: fp32 ``[B, H, N, N]``, before softmax.
        block_size: Tokens per (query block, KV block).
        num_tokens: Tokens of the sequence.
        density: Fraction of the causally valid blocks.

    Returns:
        A number in [0, 1], the mean over the rows that the loss counts.
    """
    return float(sampled_recall(target, scores, block_size, num_tokens, (density,), scores.shape[2])[0])


@torch.no_grad()
def sampled_recall(
    target: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    length: int,
    densities: tuple[float, ...],
    most: int = RECALL_ROWS,
) -> Tensor:
    """Return `target_recall` per density on at most ``most`` evenly spaced rows, on the device."""
    first, last = int(SKIPPED_ROWS * scores.shape[2]), scores.shape[2] - 1
    count = min(most, last - first + 1)
    rows = torch.linspace(first, last, count, device=scores.device, dtype=torch.float64).round().long()
    valid = causal_blocks(length, length, size, scores.device)[rows]
    target, scores = target[:, :, rows], scores[:, :, rows]
    return torch.stack([(target * TopK(d).choose(scores, valid, size[1])).sum(-1).mean() for d in densities])
