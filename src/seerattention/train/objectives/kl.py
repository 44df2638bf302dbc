"""KL: the divergence from the target to the gate's softmax over blocks, every row alike.

Source: SeerAttention, section 3.2 (arXiv 2410.13276).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KL:
    """The mean divergence per row, in nats.

    Attributes:
        power: The target is raised to this power first, rows divided by their sums again; above 1 the
            blocks with the most attention count more.
    """

    power: float = 1.0

    def __call__(self, target: Tensor, scores: Tensor, valid: Tensor, always: Tensor) -> Tensor:
        """Return the mean over rows; see `Objective`."""
        if self.power != 1:
            target = target**self.power
            target = target / target.sum(-1, keepdim=True)
        return divergence(target, scores, valid).mean()


def divergence(target: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Return each row's KL divergence from ``target`` to the softmax of ``scores`` over ``valid``.

    Args:
        target: fp32 ``[B, H, R, N]``, zero outside ``valid``.
        scores: fp32 ``[B, H, R, N]``.
        valid: bool ``[R, N]``, some in every row.

    Raises:
        ValueError: If target and scores differ in shape.

    Returns:
        fp32 ``[B, H, R]``, in nats; of a target whose rows do not sum to 1, its rows' sums times as much.
    """
    if target.shape != scores.shape:
        raise ValueError(
            f"target {list(target.shape)} and scores {list(scores.shape)} must have one shape; gates "
            "with one score per KV head learn from pooled_attention(..., per_kv_head=True)"
        )
    predicted = torch.log_softmax(scores.masked_fill(~valid, float("-inf")), dim=-1)
    # 0 * log(0) is 0 in both terms; masked places would give 0 * -inf = nan.
    return (torch.special.xlogy(target, target) - target * predicted.masked_fill(~valid, 0)).sum(-1)


create = KL
