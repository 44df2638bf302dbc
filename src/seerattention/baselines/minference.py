"""MInference: the vertical and slash lines that the last queries attend to, for all queries.

A line is worth its summed attention weight over the last queries. The paper takes the best lines and
reads every block that they cross; so a block is worth its best line here, and the policy's limit
takes the place of the paper's numbers of lines, which it searches for offline, per head. Not part of
the scores: the lines that the published code always adds, the first 30 keys and the latest 100
diagonals. They are the policy's ``sink_blocks`` and ``local_blocks``.

Source: MInference (arXiv 2407.02490), algorithm 2; details as in microsoft/MInference. Its other two
patterns, A-shape and block-sparse, are given to heads by the offline search and left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.baselines._base import Baseline
from seerattention.baselines._vertical_slash import TINY, estimate
from seerattention.gate import pool_blocks
from seerattention.rows import Rows


@dataclass(frozen=True)
class MInference(Baseline):
    """Score a block pair by the best of the vertical and slash lines that cross it.

    The last queries are those of the call: a prompt given in pieces is estimated piece by piece.

    Attributes:
        last_queries: Queries that the lines are estimated from.
    """

    last_queries: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_queries < 1:
            raise ValueError(f"last_queries must be at least 1, got {self.last_queries}")

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return the log of each block's best line, fp32 ``[B, Hq, Nq, Nk]``."""
        vertical, slash = estimate(q, k_blocks, self.last_queries)
        columns = pool_blocks(vertical[..., None], self.block_size[1], ("max",)).mT
        best = torch.maximum(_crossing(slash, q.shape[2], self.block_size), columns)
        return best.clamp_min(TINY).log().masked_fill(~valid, -math.inf)


def _crossing(slash: Tensor, queries: int, block_size: tuple[int, int]) -> Tensor:
    """Best diagonal of every block pair: ``[B, H, Tk]`` by distance -> ``[B, H, Nq, Nk]``."""
    block_q, block_k = block_size
    first_key, first_query, _ = Rows.last(queries, slash.shape[-1]).corners(block_size, slash.device)
    nearest = first_query - (first_key + block_k - 1)
    whole = queries // block_q
    out = []
    # A short last query block meets fewer diagonals.
    for rows, size in ((slice(whole), block_q), (slice(whole, None), queries % block_q)):
        if not len(nearest[rows]):
            continue
        width = size + block_k - 1
        best = F.max_pool1d(F.pad(slash, (width, width)).flatten(0, 1), width, stride=1)
        out.append(best.unflatten(0, slash.shape[:2])[..., (nearest[rows] + width).clamp_min(0)])
    return torch.cat(out, 2)


create = MInference
