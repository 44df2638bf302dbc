"""Random: what a selection of the same size is worth without any knowledge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattention.baselines._base import Baseline


@dataclass(frozen=True)
class Random(Baseline):
    """Score blocks at random, alike in every call of one shape.

    Attributes:
        seed: Of the random numbers.
    """

    seed: int = 0

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Keep nothing but the number of tokens."""
        return k[..., :1]

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return uniform random scores, fp32 ``[B, Hq, Nq, Nk]``."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (*q.shape[:2], *valid.shape)
        return torch.rand(shape, generator=generator).to(q.device)


create = Random
