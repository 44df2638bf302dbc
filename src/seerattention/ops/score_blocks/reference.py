"""The specification: products, maxima or shares over the pairs of sub-blocks, nothing of what comes later."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.dispatch import runs_everything
from seerattention.ops.options import ScoreOptions
from seerattention.ops.score_blocks._sub_blocks import max_over_sub_blocks, shares_of_sub_blocks

unsupported = runs_everything


def run(queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:
    """Return the scores."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    # A head's query summaries meet the key summaries of its group.
    grouped = (queries.to(dtype) * options.scale).unflatten(1, (keys.shape[1], -1))
    products = grouped @ keys.to(dtype).mT[:, :, None]
    if options.shares:
        seen = None if options.rows is None else options.rows.causal(options.size, products.device)
        scores = shares_of_sub_blocks(products, seen, *options.sub_blocks).flatten(1, 2)
    else:
        scores = max_over_sub_blocks(products, *options.sub_blocks).flatten(1, 2)
    if options.rows is None:
        return scores
    return scores.masked_fill(~options.rows.causal(options.block_size, scores.device), 0)
