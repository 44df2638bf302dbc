"""How much of a target a sparse selection would catch, on the rows that count."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.policies import TopK
from seerattention.selection import causal_blocks

#: Share of the query-block rows, from the start, that objectives leave out: they see few blocks. Source: the
#: published code.
SKIPPED_ROWS = 0.25

#: Rows on which recall is measured while training: all would cost a top-k of the whole map in every layer.
RECALL_ROWS = 64


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
