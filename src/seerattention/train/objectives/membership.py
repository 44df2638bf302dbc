"""Membership: is a block among the oracle's k best? Cross-entropy, both answers weighing the same.

The logit is how far a block's score lies above the row's own k-th, so no scale has to be learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.train.objectives._budget import cut, decided, masked_mean
from seerattention.train.target import counted_rows, free_blocks


@dataclass(frozen=True)
class Membership:
    """The mean over budgets and rows, in nats.

    Attributes:
        densities: The budgets.
    """

    densities: tuple[float, ...] = (0.05, 0.1, 0.2)

    def __call__(
        self, target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int
    ) -> Tensor:
        """Return the mean over budgets and rows; see `Objective`."""
        target, scores, valid = counted_rows(target, scores, block_size, num_tokens)
        free = free_blocks(valid)
        losses = [_entropy(target, scores, free, density) for density in self.densities]
        return torch.stack(losses).mean()


def _entropy(target: Tensor, scores: Tensor, free: Tensor, density: float) -> Tensor:
    bar, best = cut(scores, free, density), cut(target, free, density)
    if bar is None or best is None:
        return scores.sum() * 0
    rows = decided(free, density)
    above = torch.where(rows, scores - torch.where(rows, bar, 0), 0)
    inside = free & rows & (target > torch.where(rows, best, 0))
    outside = free & rows & ~inside
    share = inside / inside.sum(-1, keepdim=True).clamp(min=1)
    share = share + outside / outside.sum(-1, keepdim=True).clamp(min=1)
    return masked_mean(share * F.softplus(torch.where(inside, -above, above)) / 2, rows)


create = Membership
