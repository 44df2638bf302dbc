"""Oracle: the true attention map pooled over blocks, by default as the gates learn to predict it.

It costs as much as dense attention: an upper bound on quality, not a method.

Source: SeerAttention, section 3.2 (arXiv 2410.13276).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seerattention.baselines._base import Baseline
from seerattention.ops.options import Pool
from seerattention.ops.pooled_attention import pooled_map


@dataclass(frozen=True)
class Oracle(Baseline):
    """Score block pairs by the logarithm of the pooled map, so that their softmax is the map.

    Attributes:
        pool: As `pooled_map` takes it.
    """

    pool: Pool = "max"

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return the log of the pooled map, fp32 ``[B, Hq, Nq, Nk]``."""
        return pooled_map(q, k_blocks, self.block_size, pool=self.pool).log_()


create = Oracle
