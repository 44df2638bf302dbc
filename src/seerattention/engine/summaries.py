"""Block summaries that follow a KV cache, so that a text given in pieces is summarised once.

The cache can be cropped, copied, reordered or refilled by anyone, so every prefill first compares the cached
keys with those that were summarised. Summaries that no longer belong are dropped, never used; the cached
keys are rotated back by the host's code and summarised again. A step of decoding cannot afford to compare. It
goes on where the cache still holds what it held after the step before: the same tensor, not written to, or
the beginning of it. Otherwise it does what prefill does.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, NamedTuple, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from seerattention.engine.call import AttentionCall, Cached, Held, Step, Unrotate
from seerattention.engine.kept import Kept, from_columns
from seerattention.engine.padding import on_device
from seerattention.engine.steps import Steps, ample
from seerattention.scorer import Scorer

#: Tokens per slice in which cached keys are summarised again.
REBUILD_TOKENS = 2**14

#: How a row's reason begins whose cached keys cannot be summarised.
_MISSING = "dense: cached keys have no summaries, and cannot be rotated back: "

#: Why keys between padding, or some of which were taken out of a cache, cannot be.
POSITIONS = "their positions are not known"

#: Why a step cannot be captured in a graph.
CAPTURED = (
    "a step of decoding cannot be captured before there are summaries of all that its cache holds; give the "
    "model the prompt, or one step after whatever changed the cache, outside of the graph"
)


class _Seen(NamedTuple):
    """What a cache held after a call, without keeping it alive; see `Held`."""

    keys: ReferenceType[Tensor]
    length: ReferenceType[Tensor] | None
    versions: tuple[int | None, int | None, int]
    storage: StorageWeakRef
    layout: tuple[Any, ...]

    @classmethod
    def of(cls, held: Held | None) -> Self | None:
        """Remember what a cache holds."""
        if held is None:
            return None
        keys, length = held.keys, None if held.length is None else ref(held.length)
        storage = StorageWeakRef(keys.untyped_storage())
        layout = (*keys.shape, *keys.stride(), keys.storage_offset())
        return cls(ref(keys), length, held.versions, storage, layout)

    def copied(self, memo: dict[int, Any]) -> Self | None:
        """Return the same of a cache that is being copied."""
        own = [None if x is None else x() for x in self[:2]]
        keys, length = (None if x is None else memo.get(id(x)) for x in own)
        calls = self.versions[2]
        if own[0] is None or keys is None or Held.of(own[0], own[1], calls).versions != self.versions:
            return None
        return self.of(Held.of(keys, length, calls))

    def removed(self, now: Held | None) -> int | None:
        """Return by how many tokens a cache was cropped since, or None if anything else may have happened."""
        if now is None or now.versions != self.versions:
            return None
        if now.length is not (None if self.length is None else self.length()):
            return None
        # A crop leaves a view, which in inference mode does not know of what.
        if StorageWeakRef(now.keys.untyped_storage()) != self.storage:
            return None
        (batch, heads, left, dim), tokens = now.keys.shape, self.layout[2]
        layout = (batch, heads, tokens, dim, *now.keys.stride(), now.keys.storage_offset())
        return tokens - left if layout == self.layout and left <= tokens else None


class Growing:
    """Summaries that grow with a KV cache. See `Summaries`.

    Attributes:
        kept: What was known of the cached keys when the host last looked at them.
        steps: Buffers for decoding.
        ahead: Whether these hold that and what came since.
        calls: How often the layer was called with the cache since anything is kept.
    """

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.steps: Steps | None = None
        self.ahead = False
        self.calls = 0
        self._seen: _Seen | None = None
        self._beside: Growing | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Growing:
        # What is kept is replaced, never written to, so a copy of a cache may share it but for what lies in
        # buffers; and the scorer must stay the one that is attached.
        made = Growing()
        made.kept, made.calls = self.kept, self.calls
        if self.kept is not None and self.steps is not None:
            if self.ahead:
                made.steps, made.ahead = self.steps.copied(), True
                made._seen = self._seen and self._seen.copied(memo)
                made.kept = made.steps.sharing(self.kept)
            elif self.kept.finished is not None:
                made.kept = replace(self.kept, finished=self.kept.finished.clone())
        made._beside = self._beside and self._beside.__deepcopy__(memo)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled KV cache takes no gates along, and what is read back would not be those attached.
        return Growing, ()

    def beside(self) -> Growing:
        """Return what is kept of the same keys for decoding, where that has gates of its own."""
        self._beside = self._beside or Growing()
        return self._beside

    def shrunk(self, past: list[int]) -> None:
        """Remember how many tokens a cache holds before a step that is not followed; see `Kept.shrunk`."""
        self.kept = self.kept and self.kept.shrunk(past)

    def read(self) -> Tensor:
        """Return the summaries of all blocks, the last one of the tokens it has so far."""
        assert self.kept is not None
        return self.kept.read()

    def buffer(self) -> Tensor:
        """Return the summaries of finished blocks after `step`, ``[B, H, S, E]``; see `Steps`."""
        assert self.steps is not None
        return self.steps.summaries

    def follow(
        self, call: AttentionCall, scorer: Scorer, unrotate: Unrotate | None, *, compare: bool = True
    ) -> tuple[str | None, ...]:
        """Summarise a call's keys too, and cached keys that no summary belongs to."""
        new, past = [n for n, _ in call.lengths], [total - n for n, total in call.lengths]
        kept = self._cached(call, scorer, past, compare)
        reasons: list[str | None] = [None] * len(new)
        if compare and kept.tokens != past:
            kept, reasons = _caught_up(kept, call, past, unrotate)
            new = [0 if reason else n for n, reason in zip(new, reasons, strict=True)]
        self.kept, self.ahead = kept, False
        # Where they are not read, the next prefill makes up for tokens that are left out here.
        if compare or (kept.scorer is scorer and kept.tokens == past):
            k, cached = call.new_keys()
            self.kept = kept.extended(cached if scorer.after_rope else k, cached, new)
        return tuple(reasons)

    def _cached(self, call: AttentionCall, scorer: Scorer, past: list[int], compare: bool) -> Kept:
        """Return what is known of a call's cached keys."""
        nothing, known = Kept.nothing(call.given.k, scorer), self.kept
        if known is None or not any(past):
            return nothing
        if self.ahead and self.steps is not None:
            old = call.given.k.shape[2] - call.given.q.shape[2]
            begins = call.begins
            if self._goes_on(call.cached, past, begins) and past == [old - begin for begin in begins]:
                known = self.steps.kept(call.all_keys(), self.steps.left(past), known.left)
                return known if known.scorer is scorer else replace(nothing, left=known.left)
            known = known.shrunk(past, self.steps.tokens)
        if not compare:
            return known.shrunk(past)
        known = known.compared(call.all_keys(), past)
        # Whether keys were taken out, other gates' summaries tell.
        return known if known.scorer is scorer else replace(nothing, left=known.left)

    def _goes_on(self, cached: Cached, past: list[int] | None, begins: list[int] | None) -> bool:
        """Whether the buffers hold what a cache holds before a call, or more if it was cropped.

        Args:
            cached: The cache.
            past: Cached tokens per row, None where only the device knows.
            begins: The column of every row's first key.
        """
        removed = None if self._seen is None else self._seen.removed(cached.before)
        assert self.steps is not None
        if removed is None or begins != self.steps.begins:
            return False
        have = self.steps.tokens
        if have is None or past is None:
            return removed == 0
        return all(n - now == removed for n, now in zip(have, past, strict=True))

    def step(self, step: Step, scorer: Scorer, unrotate: Unrotate | None) -> str | None:
        """Summarise a step's keys too; return why there are no summaries, if so."""
        if not self._ready(step, scorer):
            if step.captured:
                raise RuntimeError(CAPTURED)
            call = step.call()
            if missing := next(filter(None, self.follow(call, scorer, unrotate)), None):
                return missing
            self.fill(call)
            return None
        assert self.steps is not None
        assert self.kept is not None
        if step.given.k.shape[2] > self.steps.room:
            self.steps = self.steps.grown(step.given.k.shape[2])
            self.kept = self.steps.sharing(self.kept)
        self.steps = self.steps.added(step)
        self._seen = _Seen.of(step.cached.after)
        return None

    def _ready(self, step: Step, scorer: Scorer) -> bool:
        """Whether a step can go on from the buffers."""
        if not self.ahead or self.steps is None or self.steps.scorer is not scorer:
            return False
        known, begins = step.lengths.known, step.lengths.begins
        past = None if known is None else [n - step.given.q.shape[2] for n in known]
        # While a graph is captured, nobody looks where sequences begin.
        if not self._goes_on(step.cached, past, self.steps.begins if begins is None else begins):
            return False
        if past is None:
            return True
        if self.kept is not None and any(map(operator.lt, past, self.kept.tokens)):
            # What comes will be written over what was kept of tokens that are gone.
            self.kept = self.kept.cropped(past)
        return self.steps.left(past) == past

    def fill(self, call: AttentionCall) -> None:
        """Bring the buffers up to date after `follow`; those of a static cache stay the same tensors."""
        kept, room = self.kept, call.cached.room
        assert kept is not None
        need = call.given.k.shape[2] if room is None else room
        if self.steps is None or not self.steps.serves(kept, need):
            self.steps = Steps.empty(kept, ample(need) if room is None else need)
        tokens = kept.tokens if room is None else None
        self.steps = self.steps.filled(kept, tokens, call.begins)
        self.kept = self.steps.sharing(kept)
        self.ahead, self._seen = True, _Seen.of(call.cached.after)


def _caught_up(
    kept: Kept, call: AttentionCall, past: list[int], unrotate: Unrotate | None
) -> tuple[Kept, list[str | None]]:
    """Summarise the cached keys that have no summaries from what the cache holds of them, or say why not."""
    reasons: list[str | None] = [None] * len(past)
    keys = call.all_keys()
    known = [] if unrotate is None else _positions_known(call)
    for row, (have, tokens) in enumerate(zip(kept.tokens, past, strict=True)):
        if unrotate is None or have == tokens:
            continue
        why = unrotate.why_not if known[row] and not kept.left[row] else POSITIONS
        if why is not None:
            reasons[row] = _MISSING + why
    kept = kept.cut([0 if reason else n for reason, n in zip(reasons, kept.tokens, strict=True)])
    while any(
        missing := [
            0 if reason else min(tokens - have, REBUILD_TOKENS)
            for have, tokens, reason in zip(kept.tokens, past, reasons, strict=True)
        ]
    ):
        part = from_columns(keys, kept.tokens, max(missing))
        if unrotate is None:
            kept = kept.extended(part, part, missing)
            continue
        assert call.first is not None
        begin = call.first.to(keys.device) + on_device(kept.tokens, keys.device)
        positions = begin[:, None] + torch.arange(part.shape[2], device=keys.device)
        kept = kept.extended(unrotate(call.layer, part, positions), part, missing)
    return kept, reasons


def _positions_known(call: AttentionCall) -> list[bool]:
    """Return whether each row's cached keys come right before its new ones, from the text's beginning on."""
    if call.first is None:
        return [False] * len(call.lengths)
    if call.padding is None:
        return (call.first == 0).tolist()
    # The host may have counted the padding on the left, or not.
    column = call.padding.keys.real.int().argmax(1).to(call.first.device)
    begins = ((call.first == 0) | (call.first == column)).tolist()
    return [begin and not between for begin, between in zip(begins, call.padding.between, strict=True)]
