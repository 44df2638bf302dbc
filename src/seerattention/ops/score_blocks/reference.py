"""The specification: products, their maxima over the pairs of sub-blocks, nothing from what comes later."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.dispatch import runs_everything
from seerattention.ops.options import ScoreOptions
from seerattention.ops.score_blocks._sub_blocks import max_over_sub_blocks

unsupported = runs_everything


def run(queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:
    """Return the scores."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    # A head's query summaries meet the key summaries of its group.
    grouped = (queries.to(dtype) * options.scale).unflatten(1, (keys.shape[1], -1))
    products = grouped @ keys.to(dtype).mT[:, :, None]
    scores = max_over_sub_blocks(products, *options.sub_blocks).flatten(1, 2)
    if options.rows is None:
        return scores
    return scores.masked_fill(~options.rows.causal(options.block_size, scores.device), 0)
