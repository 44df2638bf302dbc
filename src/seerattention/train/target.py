"""How much of a target a sparse selection would catch, on the rows that count."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.policies import Rule, TopK
from seerattention.selection import causal_blocks

#: Share of the query-block rows, from the start, that objectives leave out: they see few blocks. Source: the
#: published code.
SKIPPED_ROWS = 0.25

#: Rows on which recall is measured while training: all would cost a top-k of the whole map in every layer.
RECALL_ROWS = 64

#: Fewest blocks of a row whose recall is shown while training: any gate finds the row's own and the first.
LEAST_TAKEN = 3


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
    least: int = 1,
) -> Tensor:
    """Return `target_recall` per density on at most ``most`` evenly spaced rows, on the device.

    Where a density comes to fewer blocks of a row than ``least``, these are taken.
    """
    first, last = int(SKIPPED_ROWS * scores.shape[2]), scores.shape[2] - 1
    count = min(most, last - first + 1)
    rows = torch.linspace(first, last, count, device=scores.device, dtype=torch.float64).round().long()
    valid = causal_blocks(length, length, size, scores.device)[rows]
    target, scores = target[:, :, rows], scores[:, :, rows]
    always = torch.zeros_like(valid)
    rules = [Rule("count", max(least, TopK(d).blocks(valid.shape[1]))) for d in densities]
    return torch.stack([(target * rule.choose(scores, valid, always)).sum(-1).mean() for rule in rules])


def shown_density(density: float, num_blocks: int) -> float:
    """Return the density at which training shows recall: in a short sequence more than was asked for.

    Args:
        density: The one asked for.
        num_blocks: Blocks of the sequence.
    """
    taken = max(LEAST_TAKEN, TopK(density).blocks(num_blocks))
    return TopK(density, local_blocks=taken).always_density(num_blocks)
