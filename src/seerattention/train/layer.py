"""What one layer learns: its loss is differentiated at once, so that no layer waits for another's."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from seerattention.gate import AttnGate
from seerattention.policies import TopK
from seerattention.rows import Rows
from seerattention.selection import causal_blocks
from seerattention.train.objectives import Objective
from seerattention.train.target import SKIPPED_ROWS

#: Rows on which recall is measured: all of them would cost a top-k of the whole map in every layer.
RECALL_ROWS = 64


def gate_scores(gate: AttnGate, q_nope: Tensor, k_nope: Tensor, positions: Tensor) -> Tensor:
    """Return what ``gate(q_nope, k_nope)`` returns on causal pairs, with gradients and in bounded memory.

    What is kept for the backward pass is the size of pools, summaries and block scores, never of tokens or
    of sub-block pairs. Where q is of 16 bits, products run in bfloat16 on the gate's fp32 weights.

    Args:
        gate: The gate.
        q_nope: ``[B, Hq, T, D]`` before the rotary embedding.
        k_nope: ``[B, Hk, T, D]`` before the rotary embedding.
        positions: int64 ``[T]``.

    Returns:
        fp32 ``[B, H, N, N]``, before softmax; acausal pairs hold finite numbers without a meaning.
    """
    half = q_nope.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(q_nope.device.type, torch.bfloat16) if half else nullcontext():
        queries = gate.summarise_queries(q_nope, positions=positions)
        keys = gate.compress(k_nope, positions=positions)
    if half:
        queries, keys = queries.bfloat16(), keys.bfloat16()
    return gate.score_summaries(queries, keys, rows=Rows.last(q_nope.shape[2], k_nope.shape[2]))


def learn(
    gate: AttnGate,
    q_nope: Tensor,
    k_nope: Tensor,
    target: Tensor,
    objective: Objective,
    weight: float,
    density: float,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of one layer's weighted loss to the gate's; wait for nothing on the device.

    Args:
        gate: The gate.
        q_nope: ``[B, Hq, T, D]`` before the rotary embedding.
        k_nope: ``[B, Hk, T, D]`` before the rotary embedding.
        target: fp32 ``[B, Hq, N, N]`` from `pooled_attention`.
        objective: What to minimise.
        weight: Factor of the loss: this call's share of the global batch.
        density: Of the recall.

    Returns:
        fp32 ``[2]`` on the device: ``weight`` times loss and recall; and the scores, without a gradient.
    """
    size, length = gate.block_size, q_nope.shape[2]
    positions = torch.arange(length, device=q_nope.device)
    with torch.enable_grad():
        scores = gate_scores(gate, q_nope, k_nope, positions)
        loss = objective(target, scores, size, length) * weight
    loss.backward()
    scores = scores.detach()
    recall = sampled_recall(target, scores, size, length, (density,))[0]
    return torch.stack((loss.detach(), recall * weight)), scores


@torch.no_grad()
def sampled_recall(
    target: Tensor, scores: Tensor, size: tuple[int, int], length: int, densities: tuple[float, ...]
) -> Tensor:
    """Return `target_recall` per density on at most ``RECALL_ROWS`` evenly spaced rows, on the device."""
    first, last = int(SKIPPED_ROWS * scores.shape[2]), scores.shape[2] - 1
    count = min(RECALL_ROWS, last - first + 1)
    rows = torch.linspace(first, last, count, device=scores.device, dtype=torch.float64).round().long()
    valid = causal_blocks(length, length, size, scores.device)[rows]
    target, scores = target[:, :, rows], scores[:, :, rows]
    return torch.stack([(target * TopK(d).choose(scores, valid, size[1])).sum(-1).mean() for d in densities])
