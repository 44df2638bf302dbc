"""TopK: the same number of blocks in every row, from the density asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from seerattention.policies.base import Policy, Rule, top_blocks


@dataclass(frozen=True)
class TopK(Policy):
    """Take the k best blocks of each row, k such that ``density`` of the causal triangle is read.

    ``k = floor((1 - sqrt(1 - density)) * Nk)``, at least 1: rows shorter than k read everything, and
    the triangle's area works out to ``density``. k follows the number of blocks present, so a prompt
    given in pieces has fewer blocks in its early pieces than the same prompt at once; the other
    policies look at one row at a time and choose alike both ways.

    Source: the published code, microsoft/SeerAttention at aba03e3, ``nz_ratio``.

    Attributes:
        density: Fraction of the causally valid blocks to read, in (0, 1].
    """

    name: ClassVar[str] = "top_k"
    density: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    def blocks(self, num_blocks: int) -> int:
        """Blocks per row for a sequence of ``num_blocks`` KV blocks."""
        return max(1, int((1 - math.sqrt(1 - self.density)) * num_blocks))

    def expected_density(self, num_blocks: int, block_tokens: int) -> float:
        """Return the density of a whole prefill; see `Policy.expected_density`."""
        return self._density_of(self.blocks(num_blocks), num_blocks)

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        """Return the best blocks of each row, bool ``[B, H, Nq, Nk]``."""
        return top_blocks(scores, valid, self.blocks(scores.shape[-1]))

    def rule(self, num_blocks: int, block_tokens: int) -> Rule:
        """Return the choice as data."""
        return Rule("count", self.blocks(num_blocks))
