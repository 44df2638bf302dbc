"""One call of an attention layer, of sequences that may be rows of a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from seerattention.device import capturing
from seerattention.engine.padding import Lengths, Padding
from seerattention.ops.dense_attention import dense_attention
from seerattention.rows import Rows
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection


class Unrotate(Protocol):
    """Rotates a host model's cached keys back to what scorers read.

    Attributes:
        why_not: Why that is impossible for this model, in a few words, or None.
    """

    why_not: str | None

    def __call__(self, layer: int, k: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys ``[B, Hk, T, D]`` back that were rotated at positions int64 ``[B, T]``."""
        ...


class StepSummaries(Protocol):
    """What is kept of the keys of one layer, for steps of decoding."""

    def step(self, step: Step, scorer: Scorer, unrotate: Unrotate | None) -> str | None:
        """Make the summaries those of all keys, a step's included; return why there are none, if so."""
        ...

    def shrunk(self, past: list[int]) -> None:
        """Remember how many tokens a cache holds per row before a step, if fewer than are summarised."""
        ...

    def buffer(self) -> Tensor:
        """Return those of finished blocks after `step`, ``[B, H, S, E]``, with room for all of the cache."""
        ...

    def beside(self) -> StepSummaries:
        """Return what is kept of the same keys for decoding, where that has gates of its own."""
        ...


class Summaries(StepSummaries, Protocol):
    """What is kept of the keys of one layer, for the rows of a batch; `Growing` follows a growing cache."""

    def follow(
        self, call: AttentionCall, scorer: Scorer, unrotate: Unrotate | None, *, compare: bool = True
    ) -> tuple[str | None, ...]:
        """Make the summaries those of all of a call's keys.

        Args:
            call: The call.
            scorer: Makes them.
            unrotate: Rotates cached keys back; None where the scorer reads them as they are cached.
            compare: Whether they will be read. If not, cached keys that no summary belongs to can wait.

        Returns:
            Why a row of the batch has none, for each, or None where it has.
        """
        ...

    def read(self) -> Tensor:
        """Return the summaries of all keys, ``[B, H, N, E]``, every row's from its beginning on."""
        ...

    def fill(self, call: AttentionCall) -> None:
        """Make those of a call, after `follow`, ready for steps that are captured in a graph."""
        ...

    def beside(self) -> Summaries:
        """Return what is kept of the same keys for decoding, where that has gates of its own."""
        ...


class Given(NamedTuple):
    """The tensors of an attention layer as its host has them, padding included.

    Attributes:
        q: Queries after RoPE, ``[B, Hq, Tq, D]``.
        k: Keys after RoPE, ``[B, Hk, Tk, D]``, earlier tokens from the KV cache included.
        v: ``[B, Hk, Tk, D]``.
        q_nope: Queries before RoPE, ``[B, Hq, Tq, D]``.
        k_nope: Keys before RoPE, of the new tokens only, ``[B, Hk, Tq, D]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_nope: Tensor
    k_nope: Tensor


class Held(NamedTuple):
    """The keys of a layer in a KV cache, to tell later whether it still holds the same.

    Attributes:
        keys: The tensor, ``[B, Hk, Tk, D]``.
        length: The tensor that counts the tokens in it, where they do not fill it.
        versions: How often each was written to so far, None of inference tensors, which do not count that,
            and how often the layer was called with this cache, which says it of them too.
    """

    keys: Tensor
    length: Tensor | None
    versions: tuple[int | None, int | None, int]

    @classmethod
    def of(cls, keys: Tensor, length: Tensor | None, calls: int = 0) -> Self:
        """Look at the tensors."""
        first, second = (None if x is None or x.is_inference() else x._version for x in (keys, length))
        return cls(keys, length, (first, second, calls))


class Cached(NamedTuple):
    """What a KV cache holds of a layer around a call.

    Attributes:
        before: Before the call.
        after: After it, where the keys given are those that the cache holds; None where it makes new
            tensors each time, as quantised and offloaded caches do.
        room: Tokens that the cache can hold, None if it grows.
    """

    before: Held | None = None
    after: Held | None = None
    room: int | None = None


_NOT_CACHED = Cached()


class Part(NamedTuple):
    """Rows of a call that are computed alike.

    Attributes:
        rows: Which of the batch; None for all.
        why: Why they are dense, None where they are sparse.
        selection: What they read, once that is chosen.
    """

    rows: list[int] | None
    why: str | None
    selection: BlockSelection | None = None


def _at_hand() -> None:
    """Wait for nothing."""


#: What layers have chosen in a forward pass, by layer, for later ones that read the same.
Choices = dict[int, list[Part]]


def _packed(name: str, side: str) -> cached_property[Tensor]:
    """Return a property: one of a call's given tensors without the padding of its side."""

    def pack(call: AttentionCall) -> Tensor:
        given = getattr(call.given, name)
        return given if call.padding is None else getattr(call.padding, side).pack(given)

    return cached_property(pack)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The inputs of one attention layer.

    ``q``, ``k``, ``v``, ``q_nope`` and ``k_nope`` are of `Given`'s shapes, without padding: a padded batch's
    sequences lie behind one another in one batch entry, as ``rows`` says.

    Attributes:
        layer: Layer index.
        given: The host's tensors.
        rows: Where the queries lie among the keys.
        scale: Softmax scale.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None leaves them alone.
        sinks: ``[Hq]``, a logit per head that takes part in the softmax's denominator only, or None.
        padding: Which of the given tokens are real, or None if all are.
        summaries: What is kept of these sequences' keys in this layer, or None where nothing is kept.
        position_ids: int64 ``[B or 1, Tq]``, at which the host rotated the new tokens, or None.
        prompt_tokens: Where a prompt of known length is given in pieces, that length, tokens already cached
            included: the pieces then select what they would in one.
        cached: What the KV cache holds.
        chosen: What earlier layers chose in this forward pass.
        ready: Called before keys and values are read, which may be on their way from other devices.
    """

    layer: int
    given: Given
    rows: Rows
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    padding: Padding | None = None
    summaries: Summaries | None = None
    position_ids: Tensor | None = None
    prompt_tokens: int | None = None
    cached: Cached = _NOT_CACHED
    chosen: Choices = field(default_factory=dict)
    ready: Callable[[], None] = _at_hand

    q = _packed("q", "queries")
    k = _packed("k", "keys")
    v = _packed("v", "keys")
    q_nope = _packed("q_nope", "queries")
    k_nope = _packed("k_nope", "queries")

    @cached_property
    def positions(self) -> Tensor:
        """Position of every query in its sequence, int64 ``[Tq]``."""
        return self.rows.positions(self.given.q.device)

    @cached_property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(new tokens, all tokens) of every row of the batch."""
        known = self.rows.known
        return known if self.padding is not None else known * self.given.q.shape[0]

    @cached_property
    def first(self) -> Tensor | None:
        """At which position the host rotated each row's first key, int64 ``[B]``; None if it did not say."""
        if self.position_ids is None:
            return None
        if self.padding is not None:
            return self.padding.first(self.position_ids)
        return self.position_ids[:, 0].expand(self.given.k.shape[0]) - self.rows.first

    @cached_property
    def begins(self) -> list[int]:
        """The column of every row's first key; waits for the device if there is padding."""
        if self.padding is None:
            return [0] * self.given.k.shape[0]
        return self.padding.keys.real.int().argmax(1).tolist()

    def new_keys(self) -> tuple[Tensor, Tensor]:
        """Return the new tokens' keys before and after RoPE, ``[B, Hk, Tq, D]``, rows begin at the left."""
        after = self.given.k[:, :, -self.given.q.shape[2] :]
        if self.padding is None:
            return self.given.k_nope, after
        return self.padding.queries.align(self.given.k_nope), self.padding.queries.align(after)

    def all_keys(self) -> Tensor:
        """Return the keys after RoPE, ``[B, Hk, Tk, D]``, every row from its beginning on."""
        return self.given.k if self.padding is None else self.padding.keys.align(self.given.k)

    def part(self, rows: list[int]) -> AttentionCall:
        """Return the call of some rows of a padded batch, dense or sparse with keys that are summarised."""
        assert self.padding is not None
        given, padding = Given(*(x[rows] for x in self.given)), self.padding.part(rows)
        return replace(self, given=given, padding=padding, rows=padding.rows)

    def dense(self) -> Tensor:
        """Return what dense attention computes, of ``q``'s shape."""
        options = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        if self.padding is None:
            return dense_attention(*self.given[:3], **options)
        return self.padding.queries.pack(self.padding.dense(*self.given[:3], **options))

    def unpacked(self, out: Tensor) -> Tensor:
        """Return an output of ``q``'s shape with the padding of ``given.q``, zeros there."""
        return out if self.padding is None else self.padding.queries.unpack(out)


@dataclass(frozen=True, eq=False)
class Step:
    """A step of decoding: few new tokens of every sequence, with padding at most on the left.

    Nothing in it waits for the device but `call`, so that steps can be captured in a graph.

    Attributes:
        layer: Layer index.
        given: The host's tensors; a static cache's keys and values with all its room.
        lengths: How long the sequences are, the new tokens included.
        summaries: What is kept of these sequences' keys in this layer.
        cached: What the KV cache holds.
        call: Makes the same call for what needs to know more; waits where only the device knows lengths.
        scale: Softmax scale.
        softcap: See `AttentionCall`.
        sinks: See `AttentionCall`.
        chosen: See `AttentionCall`.
        columns: Tokens that the cache can hold; None where the keys given are all of it.
    """

    layer: int
    given: Given
    lengths: Lengths
    summaries: StepSummaries
    cached: Cached
    call: Callable[[], AttentionCall]
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    chosen: Choices = field(default_factory=dict)
    columns: int | None = None

    @property
    def captured(self) -> bool:
        """Whether a graph is being captured."""
        return capturing(self.given.q.device)

    def new_keys(self, after_rope: bool) -> Tensor:
        """Return the new tokens' keys before or after RoPE, ``[B, Hk, Tq, D]``."""
        k, new = self.given.k, self.given.q.shape[2]
        if not after_rope:
            return self.given.k_nope
        if self.lengths.held is None:
            return k[:, :, -new:]
        return k.index_select(2, self.lengths.held - new + torch.arange(new, device=k.device))


#: Computes the output of an attention layer, of ``call.q``'s shape.
Handler = Callable[[AttentionCall], Tensor]
