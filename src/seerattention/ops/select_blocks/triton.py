"""GPUs: a buffer of block scores that stays in the cache, no sort, no mask; ``kernels/choosing.py``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seerattention.ops.language import unsupported_dtype, unsupported_here
from seerattention.ops.select_blocks.kernels import choosing
from seerattention.policies import Policy
from seerattention.rows import Rows
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection


def unsupported(q: Tensor, k_blocks: Tensor, scorer: Scorer, policy: Policy, rows: Rows) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_here(q) + unsupported_dtype(k_blocks.dtype)
    return reasons + choosing.why_not(k_blocks, scorer, policy, rows)


def run(
    q: Tensor, k_blocks: Tensor, scorer: Any, policy: Policy, rows: Rows, *, positions: Tensor
) -> BlockSelection:
    """Return the selection."""
    return choosing.run(q, k_blocks, scorer, policy, rows, positions=positions, hopper=False)
