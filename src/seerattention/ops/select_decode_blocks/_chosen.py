"""From scores to the blocks that single tokens read, which every backend in PyTorch shares."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.policies import Policy
from seerattention.policies.base import rule_of


def chosen(policy: Policy, scores: Tensor, positions: Tensor, block: int, kv_heads: int) -> Tensor:
    """Return the blocks that single tokens read.

    Args:
        policy: Which blocks to take.
        scores: fp32 ``[B, H, Tq, Nk]``, before softmax; anything where a block is not finished.
        positions: int ``[B, Tq]``, every query's place among its sequence's keys; negative reads nothing.
        block: Key tokens per block.
        kv_heads: KV heads.

    Returns:
        bool ``[B, Hk, Tq, Nk]``.
    """
    number = torch.arange(scores.shape[3], device=scores.device)
    at = positions[:, None, :, None]
    finished, own = (number + 1) * block <= at + 1, number == at // block
    seen = number * block <= at
    always = policy.always(own, seen)
    scores = group_scores(scores, finished, kv_heads)
    rule = rule_of(policy, scores.shape[3], block)
    taken = rule.choose(scores, finished, always) if rule else policy.choose(scores, finished, block)
    return (taken & finished) | always


def group_scores(scores: Tensor, finished: Tensor, kv_heads: int) -> Tensor:
    """Merge the scores of query heads into one per KV head: the largest share among the heads of a group.

    Args:
        scores: fp32 ``[B, H, Tq, Nk]``, before softmax; H is 1, Hk or a multiple of it.
        finished: bool, broadcasts to the scores: the blocks that have a share.
        kv_heads: KV heads, ``Hk``.

    Returns:
        fp32 ``[B, Hk, Tq, Nk]``, logarithms of shares where H is more than Hk; -inf where not finished.

    Source: the target of decode gates, the maximum over a group's maps (SeerAttention-R, section 3.2, arXiv
        2506.08889).
    """
    scores = scores.masked_fill(~finished, float("-inf"))
    if scores.shape[1] <= kv_heads:
        return scores.expand(-1, kv_heads, -1, -1)
    total = scores.logsumexp(-1, keepdim=True)
    # Where nothing is finished there is nothing to share.
    total = total.masked_fill(total == float("-inf"), 0)
    return (scores - total).unflatten(1, (kv_heads, -1)).amax(2)
