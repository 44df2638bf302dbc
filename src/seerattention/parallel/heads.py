"""The part of gates that one process of tensor parallelism needs: of heads in order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from seerattention.gate import AttnGate
from seerattention.policies import Calibrated, Policy


def heads_of(heads: int, rank: int, size: int) -> slice:
    """Return which heads a process has; with fewer heads than processes, neighbours share one."""
    count = max(1, heads // size)
    first = rank * heads // size
    return slice(first, first + count)


def gate_of(gate: AttnGate, rank: int, size: int) -> AttnGate:
    """Return the gate of a process's heads, with the same rotary code.

    Args:
        gate: Of all heads.
        rank: The process.
        size: How many there are.
    """
    c = gate.config
    q, kv = heads_of(c.num_heads, rank, size), heads_of(c.num_kv_heads, rank, size)
    # Without numbers at first: drawing them would move the generator of whoever attaches.
    with torch.device("meta"):
        part = AttnGate(replace(c, num_heads=q.stop - q.start, num_kv_heads=kv.stop - kv.start))
    part.use_rotary(gate.rotary)
    rows = {"linear_q": kv if c.per_kv_head else q, "linear_k": kv if c.q_proj else q}
    for name, child in gate.named_children():
        weight = child.get_parameter("weight").detach()
        part.get_submodule(name).weight = nn.Parameter(weight[rows.get(name, slice(None))].clone())
    return part


def policy_of(policy: Policy, rank: int, size: int) -> Policy:
    """Return the policy of a process's heads: calibrated limits are one per head of a gate's scores.

    Args:
        policy: Of all heads.
        rank: The process.
        size: How many there are.
    """
    if not isinstance(policy, Calibrated):
        return policy
    laws = {layer: law[heads_of(len(law), rank, size)] for layer, law in policy.calibration.laws.items()}
    return replace(policy, calibration=replace(policy.calibration, laws=laws))
