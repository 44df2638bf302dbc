"""The specification: every sequence's scores, then the policy."""

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
    size, longest, masks = scorer.block_size, rows.num_blocks(scorer.block_size)[1], []
    for one in rows.sequences():
        keys = k_blocks[one.index : one.index + 1] if rows.is_packed else k_blocks
        keys = keys[:, :, : num_blocks(one.rows.num_keys, scorer.tokens_per_summary)]
        scores = scores_of(scorer, q[:, :, one.queries], keys, one.rows, positions[..., one.queries])
        mask = select(policy, scores, rows=one.rows, block_size=size).to_mask()
        masks.append(F.pad(mask, (0, longest - mask.shape[3])))
    return BlockSelection.from_mask(torch.cat(masks, 2), size, check=False)


def scores_of(scorer: Any, q: Tensor, keys: Tensor, rows: Rows, positions: Tensor) -> Tensor:
    """Score one sequence's block pairs; where scores are products, by their own specification."""
    size = scorer.block_size
    if getattr(scorer, "sub_blocks", None) is None:
        return scorer.score(q, keys, positions=positions, valid=rows.causal(size, q.device))
    queries = scorer.summarise_queries(q, positions=positions)
    options = {"scale": scorer.scale, "rows": rows, "block_size": size, "shares": compares_shares(scorer)}
    queries, keys = rounded(queries, scorer), rounded(keys.to(queries.dtype), scorer)
    return score_blocks(queries, keys, scorer.sub_blocks, **options, backend="reference")
