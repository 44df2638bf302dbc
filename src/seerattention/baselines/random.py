"""Random: what a selection of the same size is worth without any knowledge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Random:
    """Score blocks at random, alike in every call of one shape.

    Attributes:
        block_size: Tokens per (query block, KV block).
        seed: Of the random numbers.
    """

    block_size: tuple[int, int] = (64, 64)
    seed: int = 0
    after_rope = True
    tokens_per_summary = 1

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Keep nothing but the number of tokens."""
        return k[..., :1]

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return uniform random scores, fp32 ``[B, Hq, Nq, Nk]``."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (*q.shape[:2], *valid.shape)
        return torch.rand(shape, generator=generator).to(q.device)


create = Random
