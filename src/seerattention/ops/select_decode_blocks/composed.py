"""Whatever scores by products: all sequences at once, nothing waits for their lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seerattention.ops.score_blocks import score_blocks
from seerattention.ops.select_decode_blocks._chosen import chosen
from seerattention.policies import Policy
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection


def unsupported(q: Tensor, k_blocks: Tensor, scorer: Any, policy: Policy, **_: Any) -> list[str]:
    """Return the reasons why this backend cannot run."""
    if getattr(scorer, "sub_blocks", None) is None:
        return [f"the scores of {type(scorer).__name__} are no products of summaries"]
    return []


def run(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Any,
    policy: Policy,
    lengths: Tensor,
    num_keys: int,
    kv_heads: int,
) -> BlockSelection:
    """Return the selection."""
    positions = lengths[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    # Drafts longer than their sequence have queries before its beginning, which read nothing.
    queries = scorer.summarise_queries(q, positions=positions.clamp(min=0).long())
    keys = k_blocks[:, :, : num_blocks(num_keys, scorer.tokens_per_summary)].to(queries.dtype)
    scores = score_blocks(queries, keys, scorer.sub_blocks, scale=scorer.scale)
    read = chosen(policy, scores, positions, scorer.block_size[1], kv_heads)
    return BlockSelection.from_mask(read, scorer.block_size, check=False)
