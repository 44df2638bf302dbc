"""Oracle: the true attention map pooled over blocks, by the maximum as the gates learn to predict it.

It costs as much as dense attention: an upper bound on quality, not a method.

Source: SeerAttention, section 3.2 (arXiv 2410.13276).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from seerattention.baselines._base import Baseline
from seerattention.ops.attention_scores import block_mass
from seerattention.ops.pooled_attention import pooled_map


@dataclass(frozen=True)
class Oracle(Baseline):
    """Score block pairs by the logarithm of the pooled map, so that their softmax is the map.

    Attributes:
        pool: ``max`` takes a block's largest weight, ``sum`` all of them.
    """

    pool: Literal["max", "sum"] = "max"

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return the log of the pooled map, fp32 ``[B, Hq, Nq, Nk]``."""
        if self.pool == "max":
            return pooled_map(q, k_blocks, self.block_size).log()
        return block_mass(q, k_blocks, self.block_size, scale=q.shape[-1] ** -0.5).log_()


create = Oracle
