"""Focused KL: a row counts by the mass that the gate's own choice lacks against the oracle's.

Few rows look far back, and where they do, KL on average hardly sees them: most rows are close to the
oracle already. Here these few make up the mean. A floor keeps the others from being unlearned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattention.policies import TopK
from seerattention.train.objectives.kl import divergence
from seerattention.train.target import counted_rows, free_blocks


@dataclass(frozen=True)
class FocusedKL:
    """The mean divergence per row, in nats, rows weighted by what their choice lacks.

    Attributes:
        density: Budget of the choices.
        floor: Weight of a row that lacks nothing, relative to the mean row.
    """

    density: float = 0.1
    floor: float = 0.2

    def __call__(
        self, target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int
    ) -> Tensor:
        """Return the weighted mean over rows; see `Objective`."""
        target, scores, valid = counted_rows(target, scores, block_size, num_tokens)
        weight = self._lacking(target, scores.detach(), free_blocks(valid))
        weight = weight / weight.mean().clamp(min=1e-12) + self.floor
        return (weight * divergence(target, scores, valid)).sum() / weight.sum()

    def _lacking(self, target: Tensor, scores: Tensor, free: Tensor) -> Tensor:
        """Mass of the best free blocks less that of the blocks chosen, ``[B, H, R]``."""
        count = min(TopK(self.density).blocks(scores.shape[-1]), scores.shape[-1])
        left = target * free
        chosen = scores.masked_fill(~free, float("-inf")).topk(count, dim=-1).indices
        best = left.topk(count, dim=-1).values.sum(-1)
        return torch.clamp(best - left.gather(-1, chosen).sum(-1), min=0)


create = FocusedKL
