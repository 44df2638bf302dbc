"""The specification: the scorer's scores, then the policy."""

from __future__ import annotations

from torch import Tensor

from seerattention.policies import Policy, select
from seerattention.rows import Rows
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection


def unsupported(q: Tensor, k_blocks: Tensor, scorer: Scorer, policy: Policy, num_keys: int) -> list[str]:
    """Return the reasons why this backend cannot run; it runs everything."""
    return []


def run(
    q: Tensor, k_blocks: Tensor, scorer: Scorer, policy: Policy, num_keys: int, *, positions: Tensor
) -> BlockSelection:
    """Return the selection."""
    rows = Rows.last(q.shape[2], num_keys)
    valid = rows.causal(scorer.block_size, q.device)
    scores = scorer.score(q, k_blocks, positions=positions, valid=valid)
    return select(policy, scores, rows=rows, block_size=scorer.block_size)
