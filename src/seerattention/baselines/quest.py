"""Quest: an upper bound of q·k over a block from its elementwise minimum and maximum keys.

Source: Quest (arXiv 2406.10774), equation 1, written for decoding; a query block takes the best bound
of its queries here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattention.baselines._base import Baseline
from seerattention.gate import pool_blocks
from seerattention.rows import Rows


@dataclass(frozen=True)
class Quest(Baseline):
    """Score a block pair by the largest of its queries' bounds."""

    @property
    def tokens_per_summary(self) -> int:
        """One entry per KV block."""
        return self.block_size[1]

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Keep maxima and minima side by side, ``[B, Hk, Nk, 2 * D]``."""
        return pool_blocks(k, self.block_size[1], ("max", "min"))

    @property
    def sub_blocks(self) -> tuple[int, int] | None:
        """Of single queries the bound is a product; see `ProductScorer`."""
        return (1, 1) if self.block_size[0] == 1 else None

    @property
    def scale(self) -> float:
        """Factor of the products: queries are scaled as they are summarised."""
        return 1.0

    def summarise_queries(self, q: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Return positive and negative parts of queries side by side, ``[B, Hq, Tq, 2 * D]``."""
        # sum_d max(q_d * max_d, q_d * min_d) = relu(q) . max - relu(-q) . min
        scaled = q * q.shape[-1] ** -0.5
        return torch.cat([scaled.relu(), -(-scaled).relu()], -1)

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return the bounds, fp32 ``[B, Hq, Nq, Nk]``."""
        signed = self.summarise_queries(q.float(), positions=positions).unflatten(1, (k_blocks.shape[1], -1))
        bounds = (signed @ k_blocks.float().mT.unsqueeze(2)).flatten(1, 2)
        return pool_blocks(bounds, self.block_size[0], ("max",))


create = Quest
