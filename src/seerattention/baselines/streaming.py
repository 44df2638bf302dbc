"""Streaming: the first block and the latest ones, whatever the text says.

Source: StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattention.baselines._base import Baseline


@dataclass(frozen=True)
class Streaming(Baseline):
    """Score blocks by how recent they are, the first block above all."""

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Keep nothing but the number of tokens."""
        return k[..., :1]

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return the block numbers as scores, fp32 ``[B, 1, Nq, Nk]``."""
        recency = torch.arange(valid.shape[1], dtype=torch.float32, device=q.device)
        recency[0] = valid.shape[1]
        return recency.expand(q.shape[0], 1, *valid.shape)


create = Streaming
