"""Choice KL: the divergence over the blocks that are a choice, those that are read anyway left out.

A text's first block and a row's own one hold most of its attention and are read whatever their scores. With
them in the target, what is left to choose hardly counts (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seerattention.train.objectives.kl import divergence


@dataclass(frozen=True)
class ChoiceKL:
    """The mean divergence per row, in nats: of the target's rest, its rows divided by their sums again.

    Attributes:
        among_all: Factor of `kl`, which is added: a policy may ask for the first block's score too.
    """

    among_all: float = 0.1

    def __call__(self, target: Tensor, scores: Tensor, valid: Tensor, always: Tensor) -> Tensor:
        """Return the mean over rows; see `Objective`."""
        choice = valid & ~always
        rest = target.masked_fill(~choice, 0)
        rest = rest / rest.sum(-1, keepdim=True).clamp(min=LEAST_REST)
        # A row whose blocks are all read anyway has no choice, nor any of the rest.
        choice = choice | (valid & ~choice.any(1, keepdim=True))
        chosen = divergence(rest, scores, choice)
        return (chosen + self.among_all * divergence(target, scores, valid)).mean()


#: No rest of a row is divided by less, in shares of its attention.
LEAST_REST = 1e-30

create = ChoiceKL
