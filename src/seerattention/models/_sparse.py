"""The handler that `attach` installs: sparse prefill, dense decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from seerattention.attention import seer_attention
from seerattention.cache import KeySummaries
from seerattention.gate import Scorer
from seerattention.models._call import AttentionCall
from seerattention.models._crossover import crossover
from seerattention.policies import Policy
from seerattention.selection import BlockSelection, num_blocks

#: Called after every sparse layer with its inputs and the blocks that were read.
Observer = Callable[[int, AttentionCall, BlockSelection], None]


class SparsePrefill:
    """Computes attention layers over the blocks that scorers and a policy choose.

    Args:
        scorers: The scorer of every layer.
        policy: How many blocks to read.
        backend: A backend of ``block_sparse_attention``.
        min_tokens: Sequences shorter than this are dense, all others sparse; by default the table of
            measured crossovers says which, by length and, where the policy knows it, by density.
        observe: Called after every sparse layer.
    """

    def __init__(
        self,
        scorers: dict[int, Scorer],
        policy: Policy,
        backend: str,
        min_tokens: int | None,
        observe: Observer | None,
    ) -> None:
        self.scorers = scorers
        self.policy = policy
        self.backend = backend
        self.min_tokens = min_tokens
        self.observe = observe
        self.usage: Counter[str] = Counter()
        # Looked up here, not in a call, where `torch.compile` would trace the reading of a file.
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self.crossovers = {kind: crossover(kind) for kind in kinds}

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the output of one layer, ``[B, Hq, Tq, D]``."""
        scorer = self.scorers[call.layer]
        summaries = None if scorer.after_rope else _update_summaries(call, scorer)
        reason = self._why_dense(call)
        if reason is None and summaries is None and not scorer.after_rope:
            reason = "dense: the KV cache holds keys not summarised here (filled before attach, or changed)"
        self.usage[reason or "sparse"] += 1
        if reason:
            return call.dense()
        if summaries is None:
            positions = torch.arange(call.k.shape[2], device=call.k.device)
            k_blocks = scorer.compress(call.k, positions=positions)
        else:
            k_blocks = summaries.all()
        out, selection = seer_attention(
            call.q,
            call.k,
            call.v,
            scorer,
            self.policy,
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

    def _why_dense(self, call: AttentionCall) -> str | None:
        """Return why a call is computed densely, or None."""
        total = call.k.shape[2]
        if _decodes(call):
            return "dense: decoding step"
        if self.min_tokens is not None:
            return f"dense: fewer than {self.min_tokens} tokens" if total < self.min_tokens else None
        known = self.crossovers.get(call.q.device.type)
        if known is None:
            return None
        if total < known.dense_below:
            return f"dense: fewer than {known.dense_below} tokens ({known.source})"
        if call.q.shape[2] < total:
            # A later piece of a prompt: its dense computation needs a mask, and was not measured.
            return None
        block = self.scorers[call.layer].block_size[1]
        density = self.policy.expected_density(num_blocks(total, block), block)
        if density is not None and density > (most := known.densest_at(total)):
            return f"dense: the policy reads {density:.0%}, dense is faster from {most:.0%} ({known.source})"
        return None


def _decodes(call: AttentionCall) -> bool:
    return call.q.shape[2] == 1 and call.k.shape[2] > 1


def _update_summaries(call: AttentionCall, scorer: Scorer) -> KeySummaries | None:
    """Add this call's keys to the summaries; None if they do not belong to the cached keys."""
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
    # Decoding reads no summaries, so comparing all keys at every step can wait for the next prefill.
    if not (_decodes(call) and summaries.as_long_as(cached)) and not summaries.matches(cached):
        store.pop(key, None)
        return None
    summaries.extend(call.k_nope, call.k[:, :, past:])
    store[key] = summaries
    return summaries
