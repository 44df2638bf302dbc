"""Far KL: the divergence over the blocks that only scores can choose.

Policies read the first block and each row's own whatever the scores, and these two hold much of the
target: KL spends most of its gradient where nothing is decided. Here they are left out of both
distributions, and a row counts by the mass it has left.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seerattention.train.objectives.kl import divergence
from seerattention.train.target import counted_rows, free_blocks


@dataclass(frozen=True)
class FarKL:
    """The mean over rows of the free mass times the divergence of its distribution, in nats."""

    def __call__(
        self, target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int
    ) -> Tensor:
        """Return the mean over rows; see `Objective`."""
        target, scores, valid = counted_rows(target, scores, block_size, num_tokens)
        free = free_blocks(valid)
        far = target * free
        mass = far.sum(-1, keepdim=True)
        # A row without a free block has no mass, but needs something to take a softmax over.
        some = free | ~free.any(-1, keepdim=True)
        return (mass.squeeze(-1) * divergence(far / mass.clamp(min=1e-12), scores, some)).mean()


create = FarKL
