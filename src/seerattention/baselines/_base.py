"""What baselines share: they read keys after the rotary embedding and, as a rule, keep them as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from seerattention.settings import typed


@dataclass(frozen=True)
class Baseline:
    """A scorer but for `Scorer.score`.

    Attributes:
        block_size: Tokens per (query block, KV block).
    """

    block_size: tuple[int, int] = (64, 64)
    after_rope = True

    def __post_init__(self) -> None:
        sizes = typed("block_size", self.block_size, tuple[int, int])
        if min(sizes) < 1:
            raise ValueError(f"block_size must be two whole numbers >= 1, got {sizes}")
        object.__setattr__(self, "block_size", sizes)

    @property
    def tokens_per_summary(self) -> int:
        """Key tokens per entry of what `compress` returns."""
        return 1

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Keep the keys themselves."""
        return k

    def per_token(self) -> Self:
        """Return this scorer for single query tokens; see `Scorer.per_token`."""
        return replace(self, block_size=(1, self.block_size[1]))
