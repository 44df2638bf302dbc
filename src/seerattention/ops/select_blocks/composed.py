"""Whatever the scorer and the policy: the fastest backends for summaries and scores, then the policy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.dispatch import runs_everything
from seerattention.ops.score_blocks import score_blocks
from seerattention.policies import Policy, select
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer, compares_shares, rounded
from seerattention.selection import BlockSelection

unsupported = runs_everything


def run(
    q: Tensor, k_blocks: Tensor, scorer: Scorer, policy: Policy, rows: Rows, *, positions: Tensor
) -> BlockSelection:
    """Return the selection."""
    by = _by_scorer if getattr(scorer, "sub_blocks", None) is None else _by_products
    scores = by(scorer, q, k_blocks, rows, positions)
    return select(policy, scores, rows=rows, block_size=scorer.block_size)


def _by_products(scorer: Any, q: Tensor, k_blocks: Tensor, rows: Rows, positions: Tensor) -> Tensor:
    queries = scorer.summarise_queries(q, positions=positions, rows=rows)
    options = {"scale": scorer.scale, "rows": rows, "block_size": scorer.block_size}
    options["shares"] = compares_shares(scorer)
    queries, keys = rounded(queries, scorer), rounded(k_blocks.to(queries.dtype), scorer)
    return score_blocks(queries, keys, scorer.sub_blocks, **options)


def _by_scorer(scorer: Scorer, q: Tensor, k_blocks: Tensor, rows: Rows, positions: Tensor) -> Tensor:
    longest, parts = rows.num_blocks(scorer.block_size)[1], []
    for one in rows.sequences():
        keys = k_blocks[one.index : one.index + 1] if rows.is_packed else k_blocks
        keys = keys[:, :, : num_blocks(one.rows.num_keys, scorer.tokens_per_summary)]
        valid = one.rows.causal(scorer.block_size, q.device)
        scores = scorer.score(q[:, :, one.queries], keys, positions=positions[..., one.queries], valid=valid)
        parts.append(F.pad(scores, (0, longest - scores.shape[3])))
    return torch.cat(parts, 2)
