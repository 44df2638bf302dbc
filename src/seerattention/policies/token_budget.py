"""TokenBudget: the same number of tokens in every row, whatever the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from seerattention.policies.base import Policy, Rule, top_blocks


@dataclass(frozen=True)
class TokenBudget(Policy):
    """Take the best blocks of each row up to a number of tokens.

    Source: SeerAttention-R, section 3.3 (arXiv 2506.08889).

    Attributes:
        tokens: Key tokens that a row may read; rounded down to whole blocks, at least one.
    """

    name: ClassVar[str] = "token_budget"
    tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"tokens must be a whole number >= 1, got {self.tokens!r}")

    def expected_density(self, num_blocks: int, block_tokens: int) -> float:
        """Return the density of a whole prefill; see `Policy.expected_density`."""
        return self._density_of(self.blocks(block_tokens), num_blocks)

    def blocks(self, block_tokens: int) -> int:
        """Blocks per row for blocks of ``block_tokens`` keys."""
        return max(1, self.tokens // block_tokens)

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        """Return the best blocks of each row, bool ``[B, H, Nq, Nk]``."""
        return top_blocks(scores, valid, self.blocks(block_tokens))

    def rule(self, num_blocks: int, block_tokens: int) -> Rule:
        """Return the choice as data."""
        return Rule("count", self.blocks(block_tokens))
