"""XAttention: the sum of a block pair's antidiagonals, every ``stride``-th token against every other.

Source: XAttention (arXiv 2503.16428), section 3.1: tokens are grouped by stride, queries in reverse
order, so that one product of the groups adds up an antidiagonal; block scores are sums of the softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.baselines._base import Baseline
from seerattention.rows import num_blocks


@dataclass(frozen=True)
class XAttention(Baseline):
    """Score block pairs by the share of attention their antidiagonals predict.

    Attributes:
        stride: Tokens per group, a divisor of both sizes of a block.
    """

    stride: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size[0] % self.stride or self.block_size[1] % self.stride:
            raise ValueError(f"stride={self.stride} must divide the block sizes {self.block_size}")

    def per_token(self) -> Self:
        """Refuse single query tokens."""
        raise ValueError(
            "xattention ranks blocks by groups of queries and cannot choose for single tokens; decode by "
            "gates or another baseline, given as decode_gates"
        )

    @property
    def tokens_per_summary(self) -> int:
        """One entry per group of keys."""
        return self.stride

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Lay the keys of each group side by side, ``[B, Hk, groups, stride * D]``."""
        return self._groups(k, self.stride).flatten(3)

    def _groups(self, x: Tensor, size: int) -> Tensor:
        missing = -x.shape[2] % size
        return F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, self.stride))

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return the log of each block's share, fp32 ``[B, Hq, Nq, Nk]``."""
        per_q, per_k = (b // self.stride for b in self.block_size)
        groups = k_blocks.shape[1]
        reverse = self._groups(q, self.block_size[0]).flip(3).flatten(3)
        reverse = reverse.float() * (q.shape[-1] ** -0.5 / self.stride)
        keys = F.pad(k_blocks.float(), (0, 0, 0, -k_blocks.shape[2] % per_k)).mT
        past = (valid.shape[1] - num_blocks(q.shape[2], self.block_size[1])) * per_k
        real = num_blocks(q.shape[2], self.stride)
        out = []
        rows = max(1, 2**22 // (keys.shape[3] * per_q)) * per_q
        column = torch.arange(keys.shape[3], device=q.device)
        for first in range(0, reverse.shape[2], rows):
            part = reverse[:, :, first : first + rows].unflatten(1, (groups, -1))
            scores = (part @ keys.unsqueeze(2)).flatten(1, 2)
            row = torch.arange(first, first + scores.shape[2], device=q.device) + past
            scores = scores.masked_fill(column[None] > row[:, None], -math.inf)
            share = torch.softmax(scores, -1).unflatten(-1, (-1, per_k)).sum(-1)
            # Groups of nothing but padding attend evenly to everything: they have no say.
            share[:, :, max(0, real - first) :] = 0
            out.append(share.unflatten(2, (-1, per_q)).sum(3))
        return torch.cat(out, 2).log()


create = XAttention
