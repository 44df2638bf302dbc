"""Oracle by mass: the attention that each block truly gets, summed instead of its largest weight.

For a given number of blocks per row no selection keeps more attention. It costs as much as dense
attention: an upper bound on recall, not a method.

Source: the softmax map of scaled dot-product attention (arXiv 1706.03762, equation 1), summed; `oracle`
takes the maximum, as the gates' target does (SeerAttention, section 3.2, arXiv 2410.13276).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.pooled_attention.chunked import CUDA_WORK_BYTES, WORK_BYTES


@dataclass(frozen=True)
class OracleMass:
    """Score block pairs by the logarithm of their attention, so that their softmax is each one's share.

    Attributes:
        block_size: Tokens per (query block, KV block).
    """

    block_size: tuple[int, int] = (64, 64)
    after_rope = True
    tokens_per_summary = 1

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        """Keep the keys themselves."""
        return k

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return the log of each pair's summed attention, fp32 ``[B, Hq, Nq, Nk]``."""
        out = torch.zeros(*q.shape[:2], *valid.shape, dtype=torch.float32, device=q.device)
        for b in range(k_blocks.shape[0]):
            grouped = q[b].unflatten(0, (k_blocks.shape[1], -1))
            maps = out[b].unflatten(0, (k_blocks.shape[1], -1))
            for h in range(k_blocks.shape[1]):
                self._sum(grouped[h], k_blocks[b, h], maps[h])
        return out.log_()

    def _sum(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """Write the sums of a group's map, ``[G, Nq, Nk]``, a slice of query blocks at a time."""
        block_q, block_k = self.block_size
        past = k.shape[0] - q.shape[1]
        budget = CUDA_WORK_BYTES if q.is_cuda else WORK_BYTES
        step = max(1, budget // (4 * q.shape[0] * k.shape[0] * block_q))
        keys = k.float().mT
        column = torch.arange(k.shape[0], device=q.device)
        for first in range(0, out.shape[1], step):
            part = q[:, first * block_q : (first + step) * block_q].float() * q.shape[-1] ** -0.5
            row = past + first * block_q + torch.arange(part.shape[1], device=q.device)
            seen = past + first * block_q + part.shape[1]
            scores = (part @ keys[:, :seen]).masked_fill_(column[:seen] > row[:, None], -math.inf)
            share = F.pad(scores.softmax(-1), (0, -seen % block_k, 0, -part.shape[1] % block_q))
            sums = share.unflatten(-1, (-1, block_k)).sum(-1).unflatten(1, (-1, block_q)).sum(2)
            out[:, first : first + step, : sums.shape[2]] = sums


create = OracleMass
