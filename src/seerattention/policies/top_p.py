"""TopP: the fewest blocks that hold a given share of the row's softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seerattention.policies.base import Policy, Rule


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

    def rule(self, num_blocks: int, block_tokens: int) -> Rule:
        """Return the rule; see `Policy.rule`."""
        return Rule("mass", self.mass)
