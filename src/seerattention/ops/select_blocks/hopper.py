"""Hopper GPUs: scores by TMA and wgmma, one program per multiprocessor; the policy as `triton` has it.

The kernel is in ``kernels/hopper.py``; docs/kernels.md has its design and its measurements.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seerattention.ops.language import unsupported_on_hopper
from seerattention.ops.select_blocks.kernels import choosing, scores
from seerattention.policies import Policy
from seerattention.rows import Rows
from seerattention.scorer import Scorer, compares_shares
from seerattention.selection import BlockSelection


def unsupported(q: Tensor, k_blocks: Tensor, scorer: Scorer, policy: Policy, rows: Rows) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_on_hopper(q.device, k_blocks.dtype, scores.hopper_kernel)
    reasons += choosing.why_not(k_blocks, scorer, policy, rows)
    if not compares_shares(scorer):
        reasons.append("it takes scorers that compare shares")
    if k_blocks.shape[3] != scores.HOPPER_DIM:
        reasons.append(f"it takes summaries of {scores.HOPPER_DIM} numbers, not {k_blocks.shape[3]}")
    subs = getattr(scorer, "sub_blocks", None)
    if subs is not None and subs[1] not in scores.HOPPER_SUBS:
        reasons.append(f"a KV block must have 4, 8, 12, 16 or 32 summaries, not {subs[1]}")
    if rows.is_packed:
        reasons.append("it takes no packed sequences")
    return reasons


def run(
    q: Tensor, k_blocks: Tensor, scorer: Any, policy: Policy, rows: Rows, *, positions: Tensor
) -> BlockSelection:
    """Return the selection."""
    return choosing.run(q, k_blocks, scorer, policy, rows, positions=positions, hopper=True)
