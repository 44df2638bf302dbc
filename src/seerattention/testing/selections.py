"""Which blocks a policy takes or leaves for certain, given that scores are known up to rounding.

Two backends that sum in different orders may choose differently where a score lies within rounding of
the row's limit, and nowhere else. The bound comes from the sizes of the factors, none is typed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.policies import Policy, Rule
from seerattention.rows import Rows, num_blocks
from seerattention.selection import BlockSelection

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Certain:
    """The blocks that every correct backend takes, and those that none does.

    Attributes:
        taken: bool ``[B, H, Nq, Nk]``.
        left: bool ``[B, H, Nq, Nk]``.
    """

    taken: Tensor
    left: Tensor

    @classmethod
    def of(
        cls,
        scorer: Any,
        policy: Policy,
        q: Tensor,
        k_blocks: Tensor,
        *,
        positions: Tensor,
        rows: Rows,
    ) -> Certain:
        """Decide from the scores in fp64 of the summaries that backends get.

        Args:
            scorer: A `ProductScorer`.
            policy: One with a rule.
            q: ``[B, Hq, Tq, D]``, or packed sequences.
            k_blocks: Summaries of all keys.
            positions: int64 ``[Tq]`` or ``[B, Tq]``.
            rows: Where the queries lie among the keys.
        """
        if rows.is_packed:
            return cls._of_packed(scorer, policy, q, k_blocks, positions, rows)
        valid, own = rows.causal(scorer.block_size, q.device), rows.own(scorer.block_size, q.device)
        rule = policy.rule(valid.shape[1], scorer.block_size[1])
        assert rule is not None
        queries = scorer.summarise_queries(q, positions=positions)
        taken, left = [], []
        # One head at a time: fp64 scores of all of them are large.
        for h in range(queries.shape[1]):
            keys = k_blocks[:, h * k_blocks.shape[1] // queries.shape[1]].double()
            scores, slack = _scores(queries[:, h].double(), keys, scorer.sub_blocks, scorer.scale)
            sure, never = _decide(_of_head(rule, h), scores, slack, valid)
            taken.append(sure)
            left.append(never)
        always = policy.always(own, valid)
        return cls((torch.stack(taken, 1) | always) & valid, (torch.stack(left, 1) & ~always) | ~valid)

    @classmethod
    def _of_packed(
        cls, scorer: Any, policy: Policy, q: Tensor, k_blocks: Tensor, positions: Tensor, rows: Rows
    ) -> Certain:
        """Decide for every sequence alone."""
        taken, left, columns = [], [], rows.num_blocks(scorer.block_size)[1]
        for one in rows.sequences():
            keys = k_blocks[one.index, None, :, : num_blocks(one.rows.num_keys, scorer.tokens_per_summary)]
            query, places = q[:, :, one.queries], positions[..., one.queries]
            alone = cls.of(scorer, policy, query, keys, positions=places, rows=one.rows)
            missing = columns - alone.taken.shape[3]
            taken.append(F.pad(alone.taken, (0, missing)))
            left.append(F.pad(alone.left, (0, missing), value=True))
        return cls(torch.cat(taken, 2), torch.cat(left, 2))

    @property
    def share(self) -> float:
        """Share of all block pairs that are certain."""
        return float((self.taken | self.left).float().mean())

    def check(self, selection: BlockSelection) -> None:
        """Check a selection.

        Raises:
            AssertionError: If a block is chosen or left out other than rounding could explain.
        """
        mask = selection.to_mask()
        assert mask.shape == self.taken.shape, f"{list(mask.shape)}, not {list(self.taken.shape)}"
        missing, wrong = self.taken & ~mask, self.left & mask
        assert not missing.any(), (
            f"{int(missing.sum())} blocks missing, first {missing.nonzero()[0].tolist()}"
        )
        assert not wrong.any(), f"{int(wrong.sum())} blocks too many, first {wrong.nonzero()[0].tolist()}"


def _scores(q: Tensor, k: Tensor, subs: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Scores ``[B, Nq, Nk]`` in fp64, and how far fp32 sums in any order may be from them.

    A sum of E products is at most ``E * eps * sum |q_i k_i|`` off, whatever the order and even if
    intermediate results are cut off instead of rounded; scaling adds two more roundings. The maximum
    of sums is no further off than the worst of them.
    """
    exact = _largest(q @ k.mT, subs, float("-inf")) * scale
    size = _largest(q.abs() @ k.abs().mT, subs, 0.0) * scale
    return exact, (q.shape[-1] + 2) * EPS * size


def _largest(pairs: Tensor, subs: tuple[int, int], fill: float) -> Tensor:
    pairs = F.pad(pairs, (0, -pairs.shape[-1] % subs[1], 0, -pairs.shape[-2] % subs[0]), value=fill)
    return pairs.unflatten(-1, (-1, subs[1])).amax(-1).unflatten(-2, (-1, subs[0])).amax(-2)


def _of_head(rule: Rule, head: int) -> Rule:
    return replace(rule, value=rule.per_head[head]) if rule.per_head else rule


def _decide(rule: Rule, scores: Tensor, slack: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mark the blocks taken and left out whatever the scores are within their slack."""
    low = (scores - slack).masked_fill(~valid, float("-inf"))
    high = (scores + slack).masked_fill(~valid, float("-inf"))
    masked = scores.masked_fill(~valid, float("-inf"))
    share = masked.softmax(-1)
    # exp(s - max) / sum: the slacks of s, max and the sum; each exp is a power of two of a rounded
    # argument, and the sum of N of them is rounded N times.
    slack = slack.masked_fill(~valid, 0)
    spread = (masked.amax(-1, keepdim=True) - masked).masked_fill(~valid, 0)
    blocks = valid.shape[1]
    relative = torch.expm1(slack + 2 * slack.amax(-1, keepdim=True) + (2 * spread + blocks + 8) * EPS)
    # Smaller than the smallest normal float, a share may also be flushed to zero.
    tiny = torch.finfo(torch.float32).tiny
    least, most = share * (1 - relative) - tiny, share * (1 + relative) + tiny
    if rule.kind == "share":
        # The bound is the exponential of a sum of two products in fp32.
        limit = rule.value * valid.sum(-1, keepdim=True).double() ** rule.row_exponent
        off = (limit.log().abs() + 8) * EPS if rule.row_exponent else 0.0
        return least > limit * (1 + off), most <= limit * (1 - off)
    if rule.kind == "count":
        least = most = valid.double().expand_as(share)
        rounding = 0.0
    else:
        rounding = blocks * EPS
    # Before a block come at most all that may be as large, and at least all that must be larger.
    before_most = _sum_where(high, most, low, strictly=False) - most
    before_least = _sum_where(low, least, high, strictly=True)
    return before_most + rounding < rule.value, before_least - rounding >= rule.value


def _sum_where(values: Tensor, weights: Tensor, limits: Tensor, *, strictly: bool) -> Tensor:
    """For every limit of a row, the weights of the row's values that are as large, or strictly larger."""
    values, order = values.sort(dim=-1)
    below = F.pad(weights.gather(-1, order).cumsum(-1), (1, 0))
    first = torch.searchsorted(values, limits.contiguous(), right=strictly)
    return below[..., -1:] - below.gather(-1, first)
