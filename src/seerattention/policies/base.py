"""What all policies share: the common knobs, their text form, and tie-breaking top-k."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What a policy takes from a row of scores, as data that a fused kernel runs.

    Attributes:
        kind: ``share``: every block whose share of the row's softmax is above ``value``. ``count``: from
            the best block down, ties to the lower block, while fewer than ``value`` blocks are taken.
            ``mass``: the same while the blocks taken hold less than ``value`` of the row's softmax.
        value: The bound.
        per_head: Of a ``share``: the bound of each head instead; empty where all have ``value``.
        row_exponent: Of a ``share``: the bound is multiplied by the number of blocks that a row sees, raised
            to this power.
    """

    kind: Literal["share", "count", "mass"]
    value: float
    per_head: tuple[float, ...] = ()
    row_exponent: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies; a subclass adds one value and ``choose``.

    Attributes:
        sink_blocks: The first blocks of the sequence that every row reads, in blocks.
        local_blocks: The latest blocks that every row reads, its own included, in blocks.
        dense_last_rows: Query-block rows at the end that read everything, in blocks. The published
            code uses 2, because a prompt usually ends with its question.
    """

    name: ClassVar[str]
    sink_blocks: int = 0
    local_blocks: int = 1
    dense_last_rows: int = 0

    def __post_init__(self) -> None:
        for knob, least in (("sink_blocks", 0), ("local_blocks", 1), ("dense_last_rows", 0)):
            value = getattr(self, knob)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{knob} must be a whole number >= {least}, got {value!r}")

    def __init_subclass__(cls) -> None:
        # A rule describes one way of choosing; whoever changes that must not inherit it.
        if {"choose", "always"} & vars(cls).keys() and "rule" not in vars(cls):
            cls.rule = Policy.rule

    @classmethod
    def knobs(cls) -> tuple[str, ...]:
        """Names of the knobs that every policy has."""
        return tuple(f.name for f in fields(Policy))

    @classmethod
    def value_name(cls) -> str:
        """Name of the policy's own value."""
        return next(f.name for f in fields(cls) if f.name not in cls.knobs())

    @classmethod
    def form(cls) -> str:
        """Return how a policy of this kind is written, without its knobs."""
        return f"{cls.name}:<{cls.value_name()}>"

    def at(self, layer: int, num_blocks: int | None) -> Policy:
        """Return the policy as it is in a layer, where layers or lengths of prompts differ.

        Args:
            layer: Layer index.
            num_blocks: KV blocks of the whole prompt where it is given in pieces; None counts those present.
        """
        return self

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        """Return the blocks this policy takes, bool ``[B, H, Nq, Nk]``.

        Args:
            scores: fp32 ``[B, H, Nq, Nk]``, before softmax.
            valid: bool ``[Nq, Nk]``, the causally valid blocks.
            block_tokens: Key tokens per KV block.
        """
        raise NotImplementedError

    def expected_density(self, num_blocks: int, block_tokens: int) -> float | None:
        """Return the density of a whole prefill, if it does not depend on the scores.

        Args:
            num_blocks: Blocks of the sequence.
            block_tokens: Key tokens per KV block.

        Returns:
            At most this fraction of the causally valid blocks is read; None where only the scores tell.
        """
        return None

    def always_density(self, num_blocks: int) -> float:
        """Return the density of what a prompt of ``num_blocks`` blocks reads whatever the scores."""
        return self._density_of(0, num_blocks)

    def _density_of(self, count: int, num_blocks: int) -> float:
        """Density where every row takes ``count`` blocks, and those always read come on top."""
        free = max(0, num_blocks - self.dense_last_rows)
        count = min(count + self.sink_blocks + self.local_blocks, free)
        triangle = num_blocks * (num_blocks + 1) // 2
        # Rows shorter than `count` read everything, then come equal rows, then dense ones.
        read = count * (count + 1) // 2 + (free - count) * count + triangle - free * (free + 1) // 2
        return read / triangle

    def rule(self, num_blocks: int, block_tokens: int) -> Rule | None:
        """Return ``choose`` as data, or None if it has no such form: then no fused kernel runs it.

        Args:
            num_blocks: KV blocks of the sequence, ``Nk``.
            block_tokens: Key tokens per KV block.
        """
        return None

    def always(self, own: Tensor, valid: Tensor) -> Tensor:
        """Return the blocks read whatever the scores, bool ``[Nq, Nk]``.

        Args:
            own: bool ``[Nq, Nk]``, the blocks that hold the query block's own tokens.
            valid: bool ``[Nq, Nk]``, the causally valid blocks.
        """
        always = own.clone()
        always[:, : self.sink_blocks] = True
        for shift in range(1, min(self.local_blocks, own.shape[1])):
            always[:, :-shift] |= own[:, shift:]
        if self.dense_last_rows:
            always[-self.dense_last_rows :] = True
        return always & valid

    def __str__(self) -> str:
        return ",".join([f"{self.name}:{getattr(self, self.value_name())!r}", *self.changed_knobs()])

    def changed_knobs(self) -> list[str]:
        """Return the text form of the knobs that are not at their defaults."""
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(Policy)]
        return [f"{name}={value}" for name, value, default in values if value != default]


def softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """Softmax of each row over its valid blocks."""
    return torch.softmax(scores.masked_fill(~valid, float("-inf")), dim=-1)


def top_blocks(scores: Tensor, valid: Tensor, count: int) -> Tensor:
    """Mark the ``count`` best valid blocks of each row; ties go to the lower block."""
    masked = scores.masked_fill(~valid, float("-inf"))
    count = min(count, masked.shape[-1])
    worst = masked.topk(count, dim=-1).values[..., -1:]
    above = masked > worst
    ties = (masked == worst) & valid
    room = count - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))
