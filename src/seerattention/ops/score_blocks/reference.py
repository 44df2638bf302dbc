"""The specification: products, their maxima over the pairs of sub-blocks, nothing from what comes later."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.score_blocks._sub_blocks import max_over_sub_blocks
from seerattention.rows import Rows


def unsupported(**_: object) -> list[str]:
    """Return the reasons why this backend cannot run; it runs everything."""
    return []


def run(
    queries: Tensor,
    keys: Tensor,
    sub_blocks: tuple[int, int],
    scale: float,
    rows: Rows | None,
    block_size: tuple[int, int],
) -> Tensor:
    """Return the scores."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    # A head's query summaries meet the key summaries of its group.
    grouped = (queries.to(dtype) * scale).unflatten(1, (keys.shape[1], -1))
    products = grouped @ keys.to(dtype).mT[:, :, None]
    scores = max_over_sub_blocks(products, *sub_blocks).flatten(1, 2)
    return scores if rows is None else scores.masked_fill(~rows.causal(block_size, scores.device), 0)
