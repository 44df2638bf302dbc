"""The handler that `attach` installs: sparse prefill, dense decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from seerattention.attention import seer_attention
from seerattention.crossover import crossover
from seerattention.engine.call import AttentionCall
from seerattention.engine.summaries import KeySummaries
from seerattention.gate import Scorer
from seerattention.policies import Policy
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

#: Why a short piece after a long text is dense: reading all keys for few queries is what decoding does.
DECODING = "dense: decoding step"

#: Tokens per slice in which cached keys are summarised again.
REBUILD_TOKENS = 2**14


class Unrotate(Protocol):
    """Rotates a host model's cached keys back to what scorers read.

    Attributes:
        why_not: Why that is impossible for this model, in a few words, or None.
    """

    why_not: str | None

    def __call__(self, layer: int, k: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys ``[B, Hk, T, D]`` back that were rotated at positions int64 ``[B, T]``."""
        ...


#: Called after every sparse layer with its inputs and the blocks that were read.
Observer = Callable[[int, AttentionCall, BlockSelection], None]


class SparsePrefill:
    """Computes attention layers over the blocks that scorers and a policy choose.

    Args:
        scorers: The scorer of every layer.
        policy: How many blocks to read.
        before_rope: Rotates the model's cached keys back.
        backend: A backend of ``block_sparse_attention``.
        min_tokens: Sequences shorter than this are dense, all others sparse; by default the table of
            measured crossovers says which, by length and, where the policy knows it, by density.
        observe: Called after every sparse layer.

    Attributes:
        prompt_tokens: While a prompt is given in pieces by someone who knows its length, that length,
            tokens already cached included: the pieces then select what they would in one.
    """

    def __init__(
        self,
        scorers: Mapping[int, Scorer],
        policy: Policy,
        before_rope: Unrotate,
        backend: str,
        min_tokens: int | None,
        observe: Observer | None,
    ) -> None:
        self.scorers: Mapping[int, Scorer] = scorers
        self.policy = policy
        self.before_rope = before_rope
        self.backend = backend
        self.min_tokens = min_tokens
        self.observe = observe
        self.prompt_tokens: int | None = None
        self.usage: Counter[str] = Counter()
        # Looked up here, not in a call, where `torch.compile` would trace the reading of a file.
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self.crossovers = {kind: crossover(kind) for kind in kinds}

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the output of one layer, ``[B, Hq, Tq, D]``."""
        scorer = self.scorers[call.layer]
        summaries = None if scorer.after_rope else _update_summaries(call, scorer, self.before_rope)
        reason = self._why_dense(call, scorer)
        if reason is None and isinstance(summaries, str):
            reason = summaries
        self.usage[reason or "sparse"] += 1
        if reason:
            return call.dense()
        if isinstance(summaries, KeySummaries):
            k_blocks = summaries.all()
        else:
            positions = torch.arange(call.k.shape[2], device=call.k.device)
            k_blocks = scorer.compress(call.k, positions=positions)
        out, selection = seer_attention(
            call.q,
            call.k,
            call.v,
            scorer,
            self._policy_of(call, scorer),
            q_scored=call.q if scorer.after_rope else call.q_nope,
            k_blocks=k_blocks,
            positions=call.positions,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            backend=self.backend,
        )
        if self.observe is not None:
            self.observe(call.layer, call, selection)
        return out

    def _policy_of(self, call: AttentionCall, scorer: Scorer) -> Policy:
        """Return the policy, for a piece of a prompt of known length as it is for the whole prompt."""
        policy, block, tokens = self.policy.at(call.layer), scorer.block_size[1], self.prompt_tokens
        if tokens is None:
            return policy
        return policy.for_prompt(num_blocks(tokens, block), block, last_piece=call.k.shape[2] == tokens)

    def _why_dense(self, call: AttentionCall, scorer: Scorer) -> str | None:
        """Return why a call is computed densely, or None."""
        total = self.prompt_tokens or call.k.shape[2]
        if _decodes(call, scorer):
            return DECODING
        if self.min_tokens is not None:
            return f"dense: fewer than {self.min_tokens} tokens" if total < self.min_tokens else None
        known = self.crossovers.get(call.q.device.type)
        if known is None:
            return None
        if total < known.dense_below:
            return f"dense: fewer than {known.dense_below} tokens ({known.source})"
        if call.q.shape[2] < call.k.shape[2] and self.prompt_tokens is None:
            # A later piece of a prompt: its dense computation needs a mask, and was not measured.
            return None
        block = scorer.block_size[1]
        density = self.policy.expected_density(num_blocks(total, block), block)
        if density is not None and density > (most := known.densest_at(total)):
            return f"dense: the policy reads {density:.0%}, dense is faster from {most:.0%} ({known.source})"
        return None


def _decodes(call: AttentionCall, scorer: Scorer) -> bool:
    """Whether a call adds fewer tokens than a block to earlier ones, as when a guess is verified."""
    new = call.q.shape[2]
    return call.k.shape[2] > new and new < scorer.block_size[0]


def _update_summaries(call: AttentionCall, scorer: Scorer, before_rope: Unrotate) -> KeySummaries | str:
    """Summarise this call's keys too, and cached keys that no summary belongs to; or say why not."""
    past = call.k.shape[2] - call.q.shape[2]
    # Kept on the KV cache itself, so that copies of it copy them along.
    store = {} if call.cache is None else call.cache.__dict__.setdefault("seerattention_summaries", {})
    key = (call.layer, call.slot)
    summaries: KeySummaries | None = store.get(key)
    if summaries is None and call.slot is not None and (batch := store.get((call.layer, None))):
        # Padding begins with this call, so rows are computed one by one from here on.
        summaries = batch.row(call.slot)
    if summaries is None or summaries.scorer is not scorer:
        summaries = KeySummaries(scorer)
    cached = call.k[:, :, :past]
    if _decodes(call, scorer):
        # Decoding reads no summaries, so comparing all keys at every step can wait for the next prefill,
        # which also makes up for the tokens that are left out here.
        if summaries.as_long_as(cached):
            summaries.extend(call.k_nope, call.k[:, :, past:])
            store[key] = summaries
        return DECODING
    have = summaries.keep(cached)
    if have < past:
        if (why := _why_not_rebuilt(call, before_rope)) is not None:
            store.pop(key, None)
            return f"dense: cached keys have no summaries, and cannot be rotated back: {why}"
        _summarise_again(summaries, call, before_rope, have, past)
    summaries.extend(call.k_nope, call.k[:, :, past:])
    store[key] = summaries
    return summaries


def _why_not_rebuilt(call: AttentionCall, before_rope: Unrotate) -> str | None:
    if call.position_ids is None:
        return "their positions are not known"
    return before_rope.why_not


def _summarise_again(
    summaries: KeySummaries, call: AttentionCall, before_rope: Unrotate, start: int, end: int
) -> None:
    """Summarise the cached keys ``start`` to ``end`` from what the cache holds of them."""
    assert call.position_ids is not None
    first = call.position_ids[:, :1] - end
    for begin in range(start, end, REBUILD_TOKENS):
        part = call.k[:, :, begin : min(begin + REBUILD_TOKENS, end)]
        positions = first + torch.arange(begin, begin + part.shape[2], device=first.device)
        positions = positions.expand(part.shape[0], -1).to(part.device)
        summaries.extend(before_rope(call.layer, part, positions), part)
