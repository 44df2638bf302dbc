"""Which blocks a policy takes or leaves for certain, given that scores are known up to rounding.

Two backends that sum in different orders may choose differently where a score lies within rounding of
the row's limit, and nowhere else. The bound comes from the sizes of the factors, none is typed in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.gate import AttnGate, GateConfig
from seerattention.ops.cases.select_blocks import Case
from seerattention.ops.cases.select_decode_blocks import Case as DecodeCase
from seerattention.policies import Policy, Rule, rule_of
from seerattention.rows import OneSequence, Rows, num_blocks
from seerattention.scorer import compares_shares, rounded
from seerattention.selection import BlockSelection
from seerattention.testing.inputs import random_qkv

EPS = torch.finfo(torch.float32).eps


@torch.no_grad()
def arguments(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """Return what `select_blocks` is called with, but for the policy: a gate, and what it summarises."""
    q, k, _ = random_qkv(case, dtype=dtype, device=device)
    # As a model hands them over: heads after tokens in memory.
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    torch.manual_seed(1)
    config = GateConfig.published(**case.design) if case.published else GateConfig(**case.design)
    gate = AttnGate(config).to(device, dtype)
    for p in gate.parameters():
        # Scores of a few units, so that rows are neither uniform nor a single block.
        p.mul_(60 if case.published else 2)
    args = {"q": q, "scorer": gate}
    if not case.lengths:
        k_blocks = gate.compress(k, positions=torch.arange(case.keys, device=device))
        return args | {"k_blocks": k_blocks, "rows": Rows.last(case.queries, case.keys)}
    rows = Rows.packed(case.lengths, device)
    positions = torch.cat([torch.arange(keys, device=device) for _, keys in case.lengths])
    k_blocks = gate.compress(k, positions=positions, rows=rows)
    return args | {"k_blocks": rows.rectangle(k_blocks, case.keys, gate.tokens_per_summary), "rows": rows}


def alone(args: dict[str, Any]) -> Iterator[tuple[OneSequence, dict[str, Any]]]:
    """Iterate over the packed sequences of a call of `select_blocks`, each with a call of its own."""
    rows, size = args["rows"], args["scorer"].tokens_per_summary
    for one in rows.sequences():
        k_blocks = args["k_blocks"][one.index, None, :, : num_blocks(one.rows.num_keys, size)]
        yield one, args | {"q": args["q"][:, :, one.queries], "k_blocks": k_blocks, "rows": one.rows}


@torch.no_grad()
def decode_arguments(
    case: DecodeCase, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """Return what `select_decode_blocks` is called with, but for the policy; NaN past finished blocks."""
    q, k, _ = random_qkv(case, dtype=dtype, device=device)
    # As a model hands them over: heads after tokens in memory.
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.manual_seed(1)
    gate = AttnGate(GateConfig(**case.design)).to(device, dtype)
    for p in gate.parameters():
        # Scores of a few units, so that rows are neither uniform nor a single block.
        p.mul_(2)
    k_blocks = gate.compress(k, positions=torch.arange(case.keys, device=device))
    held = case.held or (case.keys,) * case.batch
    for row, length in enumerate(held):
        k_blocks[row, :, length // case.block_size[1] * gate.sub_blocks[1] :] = torch.nan
    return {
        "q": q,
        "k_blocks": k_blocks,
        "scorer": gate.per_token(),
        "lengths": torch.tensor(held, dtype=torch.int32, device=device),
        "num_keys": case.keys,
        "kv_heads": case.kv_heads,
    }


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
        rows: Rows,
        rounding: float = 0.0,
        adding: float = 0.0,
    ) -> Certain:
        """Decide from the scores in fp64 of the summaries that backends get.

        Args:
            scorer: A `ProductScorer`.
            policy: One with a rule.
            q: ``[B, Hq, Tq, D]``, or packed sequences.
            k_blocks: Summaries of all keys.
            rows: Where the queries lie among the keys.
            rounding: How far a score, or the logarithm of a share, may be off besides: the precision in
                which a backend keeps it.
            adding: How far a sum of products may be off besides what fp32 explains, as a part of the sum of
                their sizes.
        """
        if rows.is_packed:
            args = {"scorer": scorer, "q": q, "k_blocks": k_blocks, "rows": rows}
            args |= {"rounding": rounding, "adding": adding}
            return cls._of_packed(policy, args)
        valid, own = rows.causal(scorer.block_size, q.device), rows.own(scorer.block_size, q.device)
        rule = rule_of(policy, valid.shape[1], scorer.block_size[1])
        assert rule is not None
        always = policy.always(own, valid)
        queries = rounded(scorer.summarise_queries(q, positions=rows.positions(q.device)), scorer)
        k_blocks = rounded(k_blocks, scorer)
        sizes = tuple(b // s for b, s in zip(scorer.block_size, scorer.sub_blocks, strict=True))
        seen = rows.causal(sizes, q.device) if compares_shares(scorer) else None
        taken, left = [], []
        # One head at a time: fp64 scores of all of them are large.
        for h in range(queries.shape[1]):
            keys = k_blocks[:, h * k_blocks.shape[1] // queries.shape[1]].double()
            scores, slack = _scores(
                queries[:, h].double(), keys, scorer.sub_blocks, scorer.scale, seen, rounding, adding
            )
            sure, never = _decide(_of_head(rule, h), scores, slack, valid, always)
            taken.append(sure)
            left.append(never)
        return cls((torch.stack(taken, 1) | always) & valid, (torch.stack(left, 1) & ~always) | ~valid)

    @classmethod
    def _of_packed(cls, policy: Policy, args: dict[str, Any]) -> Certain:
        """Decide for every sequence alone."""
        columns = args["rows"].num_blocks(args["scorer"].block_size)[1]
        found = [cls.of(policy=policy, **own) for _, own in alone(args)]
        return cls(
            torch.cat([F.pad(x.taken, (0, columns - x.taken.shape[3])) for x in found], 2),
            torch.cat([F.pad(x.left, (0, columns - x.left.shape[3]), value=True) for x in found], 2),
        )

    @classmethod
    def of_tokens(
        cls,
        scorer: Any,
        policy: Policy,
        q: Tensor,
        k_blocks: Tensor,
        lengths: Tensor,
        num_keys: int,
        kv_heads: int,
    ) -> Certain:
        """Decide for a call of `select_decode_blocks` with a gate that has a score per KV head.

        Summaries of queries are a backend's own: their scores may be twice as far from those in fp64 as
        those of the reference are, which are made in the gate's dtype.
        """
        block, subs = scorer.block_size[1], scorer.sub_blocks
        rule = rule_of(policy, num_blocks(num_keys, block), block)
        assert rule is not None
        exact, taken, left = copy.deepcopy(scorer.gate).double().per_token(), [], []
        keys = k_blocks.nan_to_num(0).double()[:, :, : num_blocks(num_keys, block) * subs[1]]
        for b, length in enumerate(lengths.tolist()):
            at = torch.arange(length - q.shape[2], length, device=q.device)
            alone = {"positions": at.clamp(min=0)[None]}
            own_q = q[b : b + 1]
            true, slack = _scores(
                exact.summarise_queries(own_q.double(), **alone)[0], keys[b], subs, scorer.scale
            )
            rounded, _ = _scores(
                scorer.summarise_queries(own_q, **alone)[0].double(), keys[b], subs, scorer.scale
            )
            number = torch.arange(true.shape[-1], device=q.device)
            finished, own = (number + 1) * block <= at[:, None] + 1, number == at[:, None] // block
            always = policy.always(own, number * block <= at[:, None])
            slack = slack + 2 * (rounded - true).masked_fill(~finished, 0).abs().amax(-1, keepdim=True)
            sure, never = _decide(rule, true, slack, finished, always)
            taken.append((sure & finished) | always)
            left.append((never | ~finished) & ~always)
        return cls(torch.stack(taken), torch.stack(left))

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


def _scores(
    q: Tensor,
    k: Tensor,
    subs: tuple[int, int],
    scale: float,
    seen: Tensor | None = None,
    rounding: float = 0.0,
    adding: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Scores ``[B, Nq, Nk]`` in fp64, and how far fp32 sums in any order may be from them.

    With the summaries of keys that those of queries see, bool ``[Sq, Sk]``, scores are shares.

    A sum of E products is at most ``E * eps * sum |q_i k_i|`` off, whatever the order and even if
    intermediate results are cut off instead of rounded; scaling adds two more roundings. What `Certain.of`
    says may be added. The maximum of sums is no further off than the worst of them. The logarithm of a sum of
    N exponentials is as far off as the worst of them, and as N roundings of it and those of the exponents.
    """
    each = subs if seen is None else (1, subs[1])
    exact, size = (q @ k.mT) * scale, (q.abs() @ k.abs().mT) * scale
    if seen is not None:
        exact, size = exact.masked_fill(~seen, float("-inf")), size.masked_fill(~seen, 0)
    exact, size = _largest(exact, each, float("-inf")), _largest(size, each, 0.0)
    slack = ((q.shape[-1] + 2) * EPS + adding) * size
    if seen is None:
        return exact, slack + rounding
    share = exact.log_softmax(-1)
    least = share.masked_fill(torch.isinf(share), 0)
    total = slack.amax(-1, keepdim=True)
    total = total + (least.abs().amax(-1, keepdim=True) + share.shape[-1] + 8) * EPS
    slack = slack + total + rounding + least.abs() * EPS
    rows = subs[0], 1
    return _largest(share, rows, float("-inf")), _largest(slack, rows, 0.0)


def _largest(pairs: Tensor, subs: tuple[int, int], fill: float) -> Tensor:
    pairs = F.pad(pairs, (0, -pairs.shape[-1] % subs[1], 0, -pairs.shape[-2] % subs[0]), value=fill)
    return pairs.unflatten(-1, (-1, subs[1])).amax(-1).unflatten(-2, (-1, subs[0])).amax(-2)


def _of_head(rule: Rule, head: int) -> Rule:
    return replace(rule, value=rule.per_head[head]) if rule.per_head else rule


def _decide(
    rule: Rule, scores: Tensor, slack: Tensor, valid: Tensor, always: Tensor
) -> tuple[Tensor, Tensor]:
    """Mark the blocks taken besides those always read, and left out, whatever the scores in their slack."""
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
        # Free blocks take what the others leave of the count.
        least = most = (valid & ~always).double().expand_as(share)
        bound, rounding = rule.value - always.sum(-1, keepdim=True), 0.0
    else:
        bound, rounding = rule.value, blocks * EPS
    # Before a block come at most all that may be as large, and at least all that must be larger.
    before_most = _sum_where(high, most, low, strictly=False) - most
    before_least = _sum_where(low, least, high, strictly=True)
    return before_most + rounding < bound, before_least - rounding >= bound


def _sum_where(values: Tensor, weights: Tensor, limits: Tensor, *, strictly: bool) -> Tensor:
    """For every limit of a row, the weights of the row's values that are as large, or strictly larger."""
    values, order = values.sort(dim=-1)
    below = F.pad(weights.gather(-1, order).cumsum(-1), (1, 0))
    first = torch.searchsorted(values, limits.contiguous(), right=strictly)
    return below[..., -1:] - below.gather(-1, first)
