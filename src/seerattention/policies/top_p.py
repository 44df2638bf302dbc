"""TopP: the fewest blocks that hold a given share of the row's softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seerattention.policies.base import Policy, Rule, softmax


@dataclass(frozen=True)
class TopP(Policy):
    """Take the best blocks of each row until their softmaxed scores add up to ``mass``.

    Source: Twilight (arXiv 2502.02770) applies nucleus selection to attention.

    Attributes:
        mass: Share of a row's softmax over blocks to cover, in (0, 1].
    """

    name: ClassVar[str] = "top_p"
    mass: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass must be in (0, 1], got {self.mass}")

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        """Return the smallest covering set of each row, bool ``[B, H, Nq, Nk]``."""
        share = softmax(scores, valid)
        share, order = share.sort(dim=-1, descending=True, stable=True)
        # A block is taken while the blocks before it do not yet cover the mass.
        taken = share.cumsum(-1) - share < self.mass
        return torch.zeros_like(taken).scatter(-1, order, taken)

    def rule(self, num_blocks: int, block_tokens: int) -> Rule:
        """Return the choice as data."""
        return Rule("mass", self.mass)
