"""The specification: the whole softmax map, pooled. Memory grows with the square of the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int]) -> list[str]:
    """Return the reasons why this backend cannot run; it runs everything."""
    return []


def run(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], *, scale: float
) -> tuple[Tensor | None, Tensor]:
    """Return the output (None without v) and the row-normalised block-max map."""
    groups = q.shape[1] // k.shape[1]
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    causal = causal.tril(k.shape[2] - q.shape[2])
    scores = (q * scale) @ k.repeat_interleave(groups, 1).mT
    share = torch.softmax(scores.masked_fill(~causal, float("-inf")), dim=-1)
    pooled = F.max_pool2d(share.float(), block_size, stride=block_size, ceil_mode=True)
    out = None if v is None else share @ v.repeat_interleave(groups, 1)
    return out, pooled / pooled.sum(-1, keepdim=True)
