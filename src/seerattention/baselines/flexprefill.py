"""FlexPrefill: per head, mean-pooled attention where that is right for the last queries, else lines.

The last block of queries is attended to in full and once more through block means. Heads for which the
two distributions over KV blocks differ little (the root of their Jensen-Shannon divergence is below
``tau``) are query-aware: every query block is scored through means. For the others the vertical
and slash shares of the last queries, summed per block, stand for all queries; the published union of
the best verticals and slashes is the larger of the two here.

How much is taken is the policy's: `TopP` for the paper's cumulative attention ``gamma``, per row rather
than over a whole map; ``sink_blocks`` and ``local_blocks`` for the blocks that the published code adds
and for its minimum budget.

Source: FlexPrefill (arXiv 2502.20766), algorithms 2 to 4; details as in its published code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.baselines._base import Baseline
from seerattention.baselines._vertical_slash import TINY, estimate
from seerattention.baselines.meanpool import MeanPool
from seerattention.rows import Rows


@dataclass(frozen=True)
class FlexPrefill(Baseline):
    """Score block pairs by their means in query-aware heads, by verticals and slashes in others.

    The last queries are those of the call: a prompt given in pieces is estimated piece by piece.

    Attributes:
        tau: Largest root of the divergence at which a head is query-aware; 0 for no head.
    """

    tau: float = 0.1

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Return products of means or the log of shares by head, fp32 ``[B, Hq, Nq, Nk]``."""
        block_q, block_k = self.block_size
        vertical, slash = estimate(q, k_blocks, block_q)
        true = _block_sums(vertical, block_k)
        means = MeanPool(self.block_size)
        mean_keys = means.compress(k_blocks.float(), positions=positions)
        last = means.score(q[:, :, -block_q:], mean_keys, positions=positions, valid=valid)[:, :, 0]
        aware = root_divergence(last.softmax(-1), true) < self.tau
        lines = torch.maximum(true[:, :, None], _last_row(slash, q.shape[2], self.block_size))
        pooled = means.score(q, mean_keys, positions=positions, valid=valid)
        scores = torch.where(aware[..., None, None], pooled, lines.clamp_min(TINY).log())
        return scores.masked_fill(~valid, -math.inf)


def root_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the root of the Jensen-Shannon divergence over the last dimension, in nats."""
    middle = ((p + q) / 2).clamp_min(TINY).log()
    sides = torch.special.xlogy(p, p) + torch.special.xlogy(q, q) - (p + q) * middle
    # Rounding may leave the divergence of equal distributions just below zero.
    return (sides.sum(-1) / 2).clamp_min(0).sqrt()


def _block_sums(vertical: Tensor, size: int) -> Tensor:
    """Sum per block of keys: ``[B, H, Tk]`` -> ``[B, H, Nk]``."""
    return F.pad(vertical, (0, -vertical.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def _last_row(slash: Tensor, queries: int, block_size: tuple[int, int]) -> Tensor:
    """Sum the diagonals that a KV block meets in the last row of a query block, ``[B, H, Nq, Nk]``."""
    keys, block_k = slash.shape[-1], block_size[1]
    # At place d: the sum of the distances d - block_k + 1 to d. Window sums, as differences of running
    # sums would round small shares away.
    sums = F.avg_pool1d(F.pad(slash, (block_k - 1, 0)), block_k, stride=1) * block_k
    first_key, _, last_query = Rows.last(queries, keys).corners(block_size, slash.device)
    return sums[..., (last_query - first_key).clamp_min(0)]


create = FlexPrefill
