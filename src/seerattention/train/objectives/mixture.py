"""Mixture: KL for the whole distribution, which thresholds rely on, and regret for what a budget loses."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from seerattention.train.objectives.kl import KL
from seerattention.train.objectives.regret import Regret


@dataclass(frozen=True)
class Mixture:
    """KL, in nats, plus ``weight`` times regret, in shares.

    Attributes:
        weight: Of the regret.
    """

    weight: float = 3.0
    kl: KL = field(default_factory=KL)
    regret: Regret = field(default_factory=Regret)

    def __call__(
        self, target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int
    ) -> Tensor:
        """Return the sum; see `Objective`."""
        args = target, scores, block_size, num_tokens
        return self.kl(*args) + self.weight * self.regret(*args)


create = Mixture
