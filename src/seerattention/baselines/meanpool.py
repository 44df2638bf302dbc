"""Mean-pool: dot products of mean queries and mean keys, after the rotary embedding.

Source: MoBA (arXiv 2502.13189) routes with mean-pooled keys; here queries are pooled too, because
selection is per query block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seerattention.baselines._base import Baseline
from seerattention.gate import pool_blocks


@dataclass(frozen=True)
class MeanPool(Baseline):
    """Score block pairs by the product of their means."""

    @property
    def tokens_per_summary(self) -> int:
        """One entry per KV block."""
        return self.block_size[1]

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Average the keys of each block, ``[B, Hk, Nk, D]``."""
        return pool_blocks(k, self.block_size[1], ("avg",))

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return scaled products of means, fp32 ``[B, Hq, Nq, Nk]``."""
        mean = pool_blocks(q, self.block_size[0], ("avg",)).float() * q.shape[-1] ** -0.5
        grouped = mean.unflatten(1, (k_blocks.shape[1], -1))
        return (grouped @ k_blocks.float().mT.unsqueeze(2)).flatten(1, 2)


create = MeanPool
