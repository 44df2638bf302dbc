"""The specification: one sequence after another, scores as in prefill, then the policy per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.dispatch import runs_everything
from seerattention.ops.select_blocks.reference import scores_of
from seerattention.ops.select_decode_blocks._chosen import chosen as chosen
from seerattention.ops.select_decode_blocks._chosen import group_scores as group_scores
from seerattention.policies import Policy
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection

unsupported = runs_everything


def run(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Scorer,
    policy: Policy,
    lengths: Tensor,
    num_keys: int,
    kv_heads: int,
) -> BlockSelection:
    """Return the selection."""
    tokens, size = q.shape[2], scorer.block_size
    blocks = num_blocks(num_keys, size[1])
    mask = torch.zeros(q.shape[0], kv_heads, tokens, blocks, dtype=torch.bool, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        # A sequence shorter than its queries: the first of them read nothing.
        if not (last := min(tokens, length)):
            continue
        rows = Rows.last(last, length)
        keys = k_blocks[b : b + 1, :, : num_blocks(length, scorer.tokens_per_summary)]
        positions = rows.positions(q.device)
        scores = scores_of(scorer, q[b : b + 1, :, -last:], keys, rows, positions)
        read = chosen(policy, scores, positions[None], size[1], kv_heads)
        mask[b, :, -last:] = F.pad(read[0], (0, blocks - read.shape[3]))
    return BlockSelection.from_mask(mask, size, check=False)
