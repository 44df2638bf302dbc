"""What the gates minimise, and how much of the target a sparse selection would catch."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.policies import TopK
from seerattention.selection import causal_blocks

#: Share of the query-block rows, from the start, that the loss leaves out: they see few blocks.
SKIPPED_ROWS = 0.25


def gate_loss(target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int) -> Tensor:
    """Return the mean KL divergence from the target to the gate's distribution over blocks.

    Args:
        target: fp32 ``[B, H, N, N]`` from `pooled_attention`; rows sum to 1.
        scores: fp32 ``[B, H, N, N]`` from `AttnGate`, before softmax.
        block_size: Tokens per (query block, KV block).
        num_tokens: Tokens of the sequence.

    Returns:
        A scalar, in nats per row. The first quarter of the rows does not count.

    Raises:
        ValueError: If target and scores differ in shape.

    Source: SeerAttention, section 3.2 (arXiv 2410.13276); the skipped rows, the published code.
    """
    if target.shape != scores.shape:
        raise ValueError(
            f"target {list(target.shape)} and scores {list(scores.shape)} must have one shape; merge the "
            "target with group_target for gates with one score per KV head"
        )
    valid = causal_blocks(num_tokens, num_tokens, block_size, scores.device)
    first = int(SKIPPED_ROWS * scores.shape[2])
    target, scores, valid = target[:, :, first:], scores[:, :, first:], valid[first:]
    predicted = torch.log_softmax(scores.masked_fill(~valid, float("-inf")), dim=-1)
    # 0 * log(0) is 0 in both terms; masked places would give 0 * -inf = nan.
    terms = torch.special.xlogy(target, target) - target * predicted.masked_fill(~valid, 0)
    return terms.sum(-1).mean()


def group_target(target: Tensor, kv_heads: int) -> Tensor:
    """Merge the targets of each group of query heads: their maximum, rows divided by their sums again.

    Args:
        target: fp32 ``[B, Hq, Nq, Nk]``; rows sum to 1.
        kv_heads: ``Hk``.

    Returns:
        fp32 ``[B, Hk, Nq, Nk]``.

    Source: SeerAttention-R, section 3.2 (arXiv 2506.08889).
    """
    merged = target.unflatten(1, (kv_heads, -1)).amax(2)
    return merged / merged.sum(-1, keepdim=True)


@torch.no_grad()
def target_recall(
    target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int, density: float
) -> float:
    """Return the share of the target's mass in the blocks that ``TopK(density)`` takes by these scores.

    Args:
        target: fp32 ``[B, H, N, N]``; rows sum to 1.
        scores: fp32 ``[B, H, N, N]``, before softmax.
        block_size: Tokens per (query block, KV block).
        num_tokens: Tokens of the sequence.
        density: Fraction of the causally valid blocks.

    Returns:
        A number in [0, 1], the mean over the rows that the loss counts.
    """
    valid = causal_blocks(num_tokens, num_tokens, block_size, scores.device)
    first = int(SKIPPED_ROWS * scores.shape[2])
    chosen = TopK(density).choose(scores, valid, block_size[1])[:, :, first:]
    return float((target[:, :, first:] * chosen).sum(-1).mean())
