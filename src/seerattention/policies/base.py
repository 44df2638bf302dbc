"""What all policies share: rules and how they take blocks, the common knobs, the text form."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

#: How far, relatively, a density may be from the one asked for before `Policy.short_of` says so.
SHORT = 0.1


@dataclass(frozen=True)
class Rule:
    """What a policy takes from a row of scores, as data that a fused kernel runs.

    Attributes:
        kind: ``share``: every block whose share of the row's softmax is above ``value``. ``count``: as many
            blocks as make ``value`` with those that are read anyway, the best ones, ties to the lower block.
            ``mass``: from the best block down while those before hold less than ``value`` of the row's
            softmax. Shares and mass do not ask what is read anyway.
        value: The bound.
        per_head: Of a ``share``: the bound of each head instead; empty where all have ``value``.
        row_exponent: Of a ``share``: the bound is multiplied by the number of blocks that a row sees, raised
            to this power.
    """

    kind: Literal["share", "count", "mass"]
    value: float
    per_head: tuple[float, ...] = ()
    row_exponent: float = 0.0

    def choose(self, scores: Tensor, valid: Tensor, always: Tensor) -> Tensor:
        """Return the blocks taken besides those always read, which it may hold too.

        Args:
            scores: fp32 ``[B, H, Nq, Nk]``, before softmax.
            valid: bool ``[Nq, Nk]``, or one that broadcasts to the scores: the blocks to choose from.
            always: bool, shaped as valid: blocks that are read whatever the scores.

        Returns:
            bool ``[B, H, Nq, Nk]``.

        Raises:
            ValueError: If the scores have another number of heads than the rule.
        """
        if self.kind == "count":
            return _best(scores, valid & ~always, int(self.value), always.sum(-1, keepdim=True))
        share = torch.softmax(scores.masked_fill(~valid, float("-inf")), dim=-1)
        if self.kind == "share":
            self.check_heads(scores.shape[1])
            limit = share.new_tensor(self.per_head)[:, None, None] if self.per_head else self.value
            if self.row_exponent:
                limit = limit * valid.sum(-1, keepdim=True) ** self.row_exponent
            return share > limit
        share, order = share.sort(dim=-1, descending=True, stable=True)
        taken = share.cumsum(-1) - share < self.value
        return torch.zeros_like(taken).scatter(-1, order, taken)

    def check_heads(self, heads: int) -> None:
        """Raise `ValueError` if the rule is for another number of heads."""
        if len(self.per_head) not in (0, heads):
            raise ValueError(
                f"the policy has limits for {len(self.per_head)} heads, the scores have {heads}; "
                "calibrate these gates"
            )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies; a subclass adds one value and its `rule`, or else a `choose` of its own.

    Attributes:
        sink_blocks: The first blocks of the sequence that every row reads, in blocks.
        local_blocks: The latest blocks that every row reads, its own included, in blocks.
        dense_last_rows: Query-block rows at the end that read everything, in blocks. The published
            code uses 2, because a prompt usually ends with its question.
        whole: The rule of the whole prompt, in a policy for a piece of it; see `for_prompt`.
    """

    #: What every policy has besides its value: the least value of each, which is its default.
    KNOBS: ClassVar[dict[str, int]] = {"sink_blocks": 0, "local_blocks": 1, "dense_last_rows": 0}

    #: Whether it reads as much of a row wherever the row lies, and so serves single tokens too.
    decodes: ClassVar[bool] = True

    name: ClassVar[str]
    sink_blocks: int = 0
    local_blocks: int = 1
    dense_last_rows: int = 0
    whole: Rule | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for knob, least in self.KNOBS.items():
            value = getattr(self, knob)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{knob} must be a whole number >= {least}, got {value!r}")

    @classmethod
    def value_name(cls) -> str:
        """Name of the policy's own value."""
        common = {f.name for f in fields(Policy)}
        return next(f.name for f in fields(cls) if f.name not in common)

    @classmethod
    def form(cls) -> str:
        """Return how a policy of this kind is written, without its knobs."""
        return f"{cls.name}:<{cls.value_name()}>"

    def at(self, layer: int) -> Policy:
        """Return the policy as it is in a layer, where layers differ."""
        return self

    def for_prompt(self, num_blocks: int, block_tokens: int, *, rows_after: int) -> Policy:
        """Return the policy for a piece of a prompt, which chooses as it does for the whole prompt at once.

        Args:
            num_blocks: KV blocks of the whole prompt.
            block_tokens: Key tokens per KV block.
            rows_after: Rows of query blocks that the prompt has after this piece.
        """
        last_rows = max(0, self.dense_last_rows - rows_after)
        return replace(self, whole=rule_of(self, num_blocks, block_tokens), dense_last_rows=last_rows)

    def rule(self, num_blocks: int, block_tokens: int) -> Rule | None:
        """Return what the policy takes, as data; None if it chooses in code of its own. Ask by `rule_of`.

        Args:
            num_blocks: KV blocks of the sequence, ``Nk``.
            block_tokens: Key tokens per KV block.
        """
        return None

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        """Return the blocks taken by their scores alone, were none always read, bool ``[B, H, Nq, Nk]``.

        Whoever overrides it is asked here and not by `rule`, with always-read blocks on top, and no fused
        kernel runs it.

        Args:
            scores: fp32 ``[B, H, Nq, Nk]``, before softmax.
            valid: bool ``[Nq, Nk]``, the causally valid blocks.
            block_tokens: Key tokens per KV block.
        """
        rule = self.whole or self.rule(valid.shape[-1], block_tokens)
        if rule is None:
            raise NotImplementedError(f"the policy {self.name} must override rule or choose")
        return rule.choose(scores, valid, torch.zeros_like(valid))

    def always(self, own: Tensor, valid: Tensor) -> Tensor:
        """Return the blocks read whatever the scores, bool ``[..., Nq, Nk]``.

        Args:
            own: bool ``[..., Nq, Nk]``, the blocks that hold the query block's own tokens.
            valid: bool ``[..., Nq, Nk]``, the causally valid blocks.
        """
        always = own.clone()
        always[..., : self.sink_blocks] = True
        for shift in range(1, min(self.local_blocks, own.shape[-1])):
            always[..., :-shift] |= own[..., shift:]
        if self.dense_last_rows:
            always[..., -self.dense_last_rows :, :] = True
        return always & valid

    def read(self, scores: Tensor, own: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        """Return the blocks taken and those always read, bool ``[B, H, Nq, Nk]``; see `choose`, `always`."""
        always = self.always(own, valid)
        rule = rule_of(self, valid.shape[1], block_tokens)
        if rule is None:
            taken = self.choose(scores, valid, block_tokens)
        else:
            taken = rule.choose(scores, valid, always)
        return (taken | always) & valid

    def expected_density(self, num_blocks: int, block_tokens: int) -> float | None:
        """Return the density of a whole prefill, if it does not depend on the scores.

        Args:
            num_blocks: Blocks of the sequence.
            block_tokens: Key tokens per KV block.

        Returns:
            The fraction of the causally valid blocks that is read; None where only the scores tell.
        """
        rule = rule_of(self, num_blocks, block_tokens)
        return self._density_of(int(rule.value), num_blocks) if rule and rule.kind == "count" else None

    def always_density(self, num_blocks: int) -> float:
        """Return the density of what a prompt of ``num_blocks`` blocks reads whatever the scores."""
        return self._density_of(0, num_blocks)

    def asked_density(self, num_blocks: int, block_tokens: int) -> float | None:
        """Return the density that the policy's value asks for, None if it does not ask for one."""
        return None

    def short_of(self, num_blocks: int, block_tokens: int) -> str | None:
        """Return in a sentence that a prompt is too short for the density asked for; None if it is not.

        Args:
            num_blocks: Blocks of the prompt.
            block_tokens: Key tokens per KV block.
        """
        asked = self.asked_density(num_blocks, block_tokens)
        read = self.expected_density(num_blocks, block_tokens)
        if asked is None or read is None or abs(read - asked) <= SHORT * asked:
            return None
        least = self.sink_blocks + self.local_blocks
        last_rows = f", and the last {self.dense_last_rows} read all" if self.dense_last_rows else ""
        return (
            f"{self} asks for {asked:.1%} of a prompt of {num_blocks} blocks and reads {read:.1%}: "
            f"a row reads whole blocks, at least {least}{last_rows}"
        )

    def _density_of(self, count: int, num_blocks: int) -> float:
        """Density where every row reads ``count`` blocks, more only where more are always read."""
        free = max(0, num_blocks - self.dense_last_rows)
        count = min(max(count, self.sink_blocks + self.local_blocks), free)
        triangle = num_blocks * (num_blocks + 1) // 2
        # Rows shorter than `count` read everything, then come equal rows, then dense ones.
        read = count * (count + 1) // 2 + (free - count) * count + triangle - free * (free + 1) // 2
        return read / triangle

    def __str__(self) -> str:
        return ",".join([f"{self.name}:{getattr(self, self.value_name())!r}", *self.changed_knobs()])

    def changed_knobs(self) -> list[str]:
        """Return the text form of the knobs that are not at their defaults."""
        values = [(knob, getattr(self, knob), least) for knob, least in self.KNOBS.items()]
        return [f"{knob}={value}" for knob, value, least in values if value != least]


def rule_of(policy: Policy, num_blocks: int, block_tokens: int) -> Rule | None:
    """Return the rule that a policy goes by, or None where it overrides `Policy.choose`.

    Args:
        policy: The policy.
        num_blocks: KV blocks of the sequence, ``Nk``; of a prompt's piece they do not count.
        block_tokens: Key tokens per KV block.
    """
    if type(policy).choose is not Policy.choose:
        return None
    return policy.whole or policy.rule(num_blocks, block_tokens)


def _best(scores: Tensor, free: Tensor, count: int, others: Tensor) -> Tensor:
    """Mark the best free blocks that make ``count`` with ``[Nq, 1]`` others; ties go to the lower block."""
    masked = scores.masked_fill(~free, float("-inf"))
    best = masked.topk(min(count, masked.shape[-1]), dim=-1).values
    room = count - others
    last = (room - 1).clamp(0, best.shape[-1] - 1).expand(*best.shape[:-1], 1)
    worst = best.gather(-1, last)
    above = masked > worst
    ties = (masked == worst) & free
    return above | (ties & (ties.cumsum(-1) <= room - above.sum(-1, keepdim=True)))
