"""Threshold: every block whose share of the row's softmax exceeds a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seerattention.policies.base import Policy, Rule


@dataclass(frozen=True)
class Threshold(Policy):
    """Take blocks whose softmaxed score is above ``value``; density then adapts to row and head.

    Published values are 5e-4 (RULER) to 5e-3, for gates taught the published target by ``kl``. Others predict
    something else, so that the same value reads more or less: calibrate them (docs/method.md).

    Source: SeerAttention, section 4 (arXiv 2410.13276).

    Attributes:
        value: Share of a row's softmax over blocks, in [0, 1).
    """

    name: ClassVar[str] = "threshold"
    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.value < 1:
            raise ValueError(f"threshold must be in [0, 1), got {self.value}")

    def rule(self, num_blocks: int, block_tokens: int) -> Rule:
        """Return the rule; see `Policy.rule`."""
        return Rule("share", self.value)
