"""Mean-pool: dot products of mean queries and mean keys, after the rotary embedding.

Source: MoBA (arXiv 2502.13189) routes with mean-pooled keys; here queries are pooled too, because
selection is per query block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seerattention.baselines._base import Baseline
from seerattention.gate import pool_blocks
from seerattention.rows import Rows


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

    @property
    def sub_blocks(self) -> tuple[int, int] | None:
        """Of single queries the score is a product; see `ProductScorer`."""
        return (1, 1) if self.block_size[0] == 1 else None

    @property
    def scale(self) -> float:
        """Factor of the products: queries are scaled as they are summarised."""
        return 1.0

    def summarise_queries(self, q: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Average the queries of each block and scale them, ``[B, Hq, Nq, D]``."""
        return pool_blocks(q, self.block_size[0], ("avg",)) * q.shape[-1] ** -0.5

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return scaled products of means, fp32 ``[B, Hq, Nq, Nk]``."""
        mean = self.summarise_queries(q.float(), positions=positions)
        grouped = mean.unflatten(1, (k_blocks.shape[1], -1))
        return (grouped @ k_blocks.float().mT.unsqueeze(2)).flatten(1, 2)


create = MeanPool
