"""TokenBudget: the same number of tokens in every row, whatever the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seerattention.policies.base import Policy, Rule


@dataclass(frozen=True)
class TokenBudget(Policy):
    """Read the same number of blocks in every row: those always read, then the best.

    Source: SeerAttention-R, section 3.3 (arXiv 2506.08889).

    Attributes:
        tokens: Key tokens that a row reads, dense last rows apart; rounded down to whole blocks, at least
            one.
    """

    name: ClassVar[str] = "token_budget"
    tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"tokens must be a whole number >= 1, got {self.tokens!r}")

    def blocks(self, block_tokens: int) -> int:
        """Blocks per row for blocks of ``block_tokens`` keys."""
        return max(1, self.tokens // block_tokens)

    def asked_density(self, num_blocks: int, block_tokens: int) -> float:
        """Return the density of rows of exactly ``tokens`` keys; see `Policy.asked_density`."""
        count = min(self.tokens / block_tokens, num_blocks)
        return count * (2 * num_blocks - count + 1) / (num_blocks * (num_blocks + 1))

    def rule(self, num_blocks: int, block_tokens: int) -> Rule:
        """Return the rule; see `Policy.rule`."""
        return Rule("count", self.blocks(block_tokens))
