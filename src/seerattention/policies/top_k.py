"""TopK: the same number of blocks in every row, from the density asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from seerattention.policies.base import Policy, Rule


@dataclass(frozen=True)
class TopK(Policy):
    """Read k blocks in every row, those always read and then the best, k such that ``density`` is read.

    ``k = floor((1 - sqrt(1 - density)) * Nk)``, at least 1: rows shorter than k read everything, and the
    causal triangle's area works out to ``density``. Dense last rows are outside of that, as in the published
    code: which rows are dense is a rule about rows, and no choice of k would make up for them in short
    prompts. `Policy.expected_density` tells what both come to, the same whatever the scores. k follows the
    number of blocks present; a prompt given in pieces by `prefill` goes by that of the whole prompt.

    Source: the published code, microsoft/SeerAttention at aba03e3, ``nz_ratio``.

    Attributes:
        density: Fraction of the causally valid blocks to read, in (0, 1].
    """

    name: ClassVar[str] = "top_k"
    decodes: ClassVar[bool] = False
    density: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    def blocks(self, num_blocks: int) -> int:
        """Blocks per row for a sequence of ``num_blocks`` KV blocks."""
        return max(1, int((1 - math.sqrt(1 - self.density)) * num_blocks))

    def asked_density(self, num_blocks: int, block_tokens: int) -> float:
        """Return ``density``."""
        return self.density

    def rule(self, num_blocks: int, block_tokens: int) -> Rule:
        """Return the rule; see `Policy.rule`."""
        return Rule("count", self.blocks(num_blocks))
