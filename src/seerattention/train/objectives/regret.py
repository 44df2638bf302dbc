"""Regret: the mass that a budget's blocks lack against the best ones, made smooth.

With ``k`` blocks to choose, the mass lost against the oracle's choice is exactly the sum over wrongly
left and wrongly taken blocks of ``|target - c|``, ``c`` the target between its k-th and next largest
block, as both choices have k blocks. Wrong means on the other side of the scores' own k-th; a logistic
loss stands in for that step. A row in which a far block with much mass is missed weighs as much as it
costs; the order of blocks that are all taken, or all left, does not matter. The first block and a row's
own are read anyway and take no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.train.objectives._budget import cut, decided, masked_mean
from seerattention.train.target import counted_rows, free_blocks


@dataclass(frozen=True)
class Regret:
    """The mean over budgets and rows, in shares of the row's mass.

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
        losses = [_regret(target, scores, free, density) for density in self.densities]
        return torch.stack(losses).mean()


def _regret(target: Tensor, scores: Tensor, free: Tensor, density: float) -> Tensor:
    bar, best = cut(scores, free, density), cut(target, free, density)
    if bar is None or best is None:
        return scores.sum() * 0
    rows = decided(free, density)
    # Rows without a choice have infinite bars: their differences must not reach a gradient.
    above = torch.where(rows, scores - torch.where(rows, bar, 0), 0)
    worth = torch.where(rows, target - torch.where(rows, best, 0), 0)
    wrong = F.softplus(torch.where(worth > 0, -above, above))
    return masked_mean(torch.where(free, worth.abs() * wrong, 0), rows)


create = Regret
