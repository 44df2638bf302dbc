"""What one layer learns: its loss is differentiated at once, its sub-block scores in bounded slices."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seerattention.distill.objectives import Objective
from seerattention.distill.target import SKIPPED_ROWS
from seerattention.gate import AttnGate
from seerattention.policies import TopK
from seerattention.selection import causal_blocks, num_blocks

#: Sub-block scores, and tokens cast to the gate's precision, are held in slices of at most this many bytes.
#: Differentiating a slice's maxima takes about four times as much.
SLICE_BYTES = 256 * 2**20

#: Rows on which recall is measured: all of them would cost a top-k of the whole map in every layer.
RECALL_ROWS = 64


def gate_scores(gate: AttnGate, q_nope: Tensor, k_nope: Tensor, positions: Tensor) -> Tensor:
    """Return what ``gate(q_nope, k_nope)`` returns on causal pairs, with gradients and in bounded memory.

    Keys and then rows of query blocks are taken in slices; a row slice meets its causal keys only, and
    its sub-block scores are computed again in the backward pass. No copy of all of q or k is made.
    Where q is of 16 bits, products run in bfloat16 under autocast on the gate's fp32 weights.

    Args:
        gate: The gate.
        q_nope: ``[B, Hq, T, D]`` before the rotary embedding.
        k_nope: ``[B, Hk, T, D]`` before the rotary embedding.
        positions: int64 ``[T]``.

    Returns:
        fp32 ``[B, H, N, N]``, before softmax; acausal pairs hold arbitrary finite numbers.
    """
    size, length = gate.config.block_size, q_nope.shape[2]
    token_bytes = 4 * q_nope[:, :, 0].numel()
    step = max(1, SLICE_BYTES // (token_bytes * size)) * size
    half = q_nope.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(q_nope.device.type, torch.bfloat16) if half else nullcontext():
        keys = torch.cat(
            [
                gate.compress(k_nope[:, :, s : s + step], positions=positions[s : s + step])
                for s in range(0, length, step)
            ],
            dim=2,
        )
        parts, start, blocks = [], 0, num_blocks(length, size)
        while start < length:
            stop = min(length, start + min(step, _rows(gate, q_nope, length)))
            seen = num_blocks(stop, gate.config.k_sub)
            part = checkpoint(
                _score, gate, q_nope[:, :, start:stop], keys[:, :, :seen], positions[start:stop],
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            parts.append(F.pad(part.float(), (0, blocks - part.shape[-1])))
            start = stop
        return torch.cat(parts, dim=2)


def _score(gate: AttnGate, q: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    return gate.score(q, keys, positions=positions)


def _rows(gate: AttnGate, q: Tensor, length: int) -> int:
    """Return query tokens, whole blocks, whose sub-block scores fit a slice."""
    c = gate.config
    heads = c.num_kv_heads if c.per_kv_head else c.num_heads
    row = 4 * q.shape[0] * heads * num_blocks(length, c.k_sub) * (c.block_size // c.q_sub)
    return max(1, SLICE_BYTES // row) * c.block_size


def learn(
    gate: AttnGate,
    q_nope: Tensor,
    k_nope: Tensor,
    target: Tensor,
    objective: Objective,
    weight: float,
    density: float,
) -> Tensor:
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
        fp32 ``[2]`` on the device: ``weight`` times loss and recall.
    """
    size, length = gate.block_size, q_nope.shape[2]
    positions = torch.arange(length, device=q_nope.device)
    with torch.enable_grad():
        scores = gate_scores(gate, q_nope, k_nope, positions)
        loss = objective(target, scores, size, length) * weight
    loss.backward()
    recall = sampled_recall(target, scores.detach(), size, length, (density,))[0]
    return torch.stack((loss.detach(), recall * weight))


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
