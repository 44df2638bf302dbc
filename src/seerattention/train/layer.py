"""What one layer learns: its loss is differentiated at once, so that no layer waits for another's."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from seerattention.gate import AttnGate
from seerattention.rows import Rows
from seerattention.train.objectives import Objective
from seerattention.train.target import LEAST_TAKEN, sampled_recall


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

    Queries and keys are those of `gate_scores`, the target is fp32 ``[B, Hq, N, N]`` from `pooled_attention`,
    ``weight`` a factor of the loss, this call's share of the global batch, ``density`` that of the recall.

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
    recall = sampled_recall(target, scores, size, length, (density,), least=LEAST_TAKEN)[0]
    return torch.stack((loss.detach(), recall * weight)), scores
