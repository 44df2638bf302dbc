"""What one layer learns: its loss is differentiated at once, so that no layer waits for another's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from seerattention.gate import AttnGate
from seerattention.ops.score_blocks import score_blocks
from seerattention.ops.select_decode_blocks.reference import group_scores
from seerattention.rows import Rows, num_blocks
from seerattention.train.objectives import Objective
from seerattention.train.target import (
    LEAST_TAKEN,
    Counted,
    counted,
    decode_counted,
    decode_rows,
    finished,
    sampled_recall,
)


def gate_scores(
    gate: AttnGate,
    q_nope: Tensor,
    k_nope: Tensor,
    positions: Tensor,
    phases: Collection[str] = ("prefill",),
    taught: Rows | None = None,
) -> dict[str, Tensor]:
    """Return a gate's scores by phase, with gradients and in bounded memory, from one set of key summaries.

    What is kept for the backward pass is the size of pools, summaries and block scores, never of tokens or
    of sub-block pairs. Where q is of 16 bits, products run in bfloat16 on the gate's fp32 weights.

    Args:
        gate: The gate.
        q_nope: ``[B, Hq, T, D]`` before the rotary embedding; for prefill the queries in ``taught`` will do.
        k_nope: ``[B, Hk, T, D]`` before the rotary embedding.
        positions: int64 ``[T]``.
        phases: Which scores.
        taught: Of which queries those of prefill are, from `taught_rows`; default all.

    Returns:
        Of ``prefill`` what ``gate(q_nope, k_nope)`` returns on causal pairs, fp32 ``[B, H, N, N]`` before
        softmax, or the rows of the queries in ``taught`` and the columns that these see; acausal pairs hold
        finite numbers without a meaning. Of ``decode`` the scores of the tokens in `decode_rows`, merged by
        `group_scores`, fp32 ``[B, Hk, R, N]``, -inf where a block is not finished.
    """
    half, heads, length = q_nope.dtype in (torch.float16, torch.bfloat16), *k_nope.shape[1:3]
    taught, single, queries = taught or Rows.last(length, length), gate.per_token(), {}
    run = slice(taught.first, taught.num_keys)
    asked = q_nope if q_nope.shape[2] == taught.num_queries else q_nope[:, :, run]
    with torch.autocast(q_nope.device.type, torch.bfloat16) if half else nullcontext():
        if "prefill" in phases:
            queries["prefill"] = gate.summarise_queries(asked, positions=positions[..., run])
        if "decode" in phases:
            rows = decode_rows(length, q_nope.device)
            queries["decode"] = single.summarise_queries(q_nope[:, :, rows], positions=positions[rows])
        keys = gate.compress(k_nope, positions=positions)
    if half:
        queries, keys = {phase: x.bfloat16() for phase, x in queries.items()}, keys.bfloat16()
    found = {}
    if "prefill" in phases:
        seen = keys[:, :, : num_blocks(taught.num_keys, gate.tokens_per_summary)]
        found["prefill"] = gate.score_summaries(queries["prefill"], seen, rows=taught)
    if "decode" in phases:
        scores = score_blocks(queries["decode"], keys, single.sub_blocks, scale=single.scale)
        whole = finished(rows, scores.shape[3], gate.config.block_size)
        found["decode"] = group_scores(scores, whole, heads)
    return found


def rows_of(
    phase: str,
    gate: AttnGate,
    target: Tensor,
    scores: Tensor,
    num_tokens: int,
    taught: Rows | None = None,
) -> Counted:
    """Return the rows of a phase's target and scores that count, in prefill of those in ``taught``."""
    if phase == "prefill":
        return counted(target, scores, gate.block_size, num_tokens, taught=taught)
    rows = decode_rows(num_tokens, scores.device)
    return decode_counted(target, scores, rows, gate.config.block_size)


def learn(
    gate: AttnGate,
    q_nope: Tensor,
    k_nope: Tensor,
    targets: Mapping[str, Tensor],
    objective: Objective,
    weight: float,
    density: float,
    *,
    positions: Tensor | None = None,
    taught: Rows | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of one layer's weighted loss to the gate's; wait for nothing on the device.

    Queries and keys are those of `gate_scores`, the targets by phase the map of `pooled_attention`, fp32
    ``[B, H, N, N]`` or of the queries in ``taught``, and that of `decode_target` in `decode_rows`; their
    losses are added. ``weight`` is a factor of the loss, this call's share of the global batch, ``density``
    that of the recall. ``positions`` are the tokens', default 0, 1, 2, ...

    Returns:
        fp32 ``[1 + phases]`` on the device: ``weight`` times loss and recall in each phase; and the scores by
        phase, without a gradient.
    """
    length = k_nope.shape[2]
    if positions is None:
        positions = torch.arange(length, device=q_nope.device)
    with torch.enable_grad():
        scores = gate_scores(gate, q_nope, k_nope, positions, targets, taught)
        rows = [
            rows_of(phase, gate, target, scores[phase], length, taught) for phase, target in targets.items()
        ]
        loss = torch.stack([objective(*one) for one in rows]).sum() * weight
    loss.backward()
    values = [loss.detach()]
    for one in rows:
        values.append(sampled_recall(one, (density,), least=LEAST_TAKEN)[0] * weight)
    return torch.stack(values), {phase: found.detach() for phase, found in scores.items()}
