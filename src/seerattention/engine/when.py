"""Sparse or dense: which sequences of a call are computed densely, and why."""

from __future__ import annotations

from seerattention.crossover import Crossover
from seerattention.engine.call import AttentionCall
from seerattention.policies import Policy
from seerattention.rows import num_blocks
from seerattention.scorer import Scorer

#: Why a short piece after a long text is dense: reading all keys for few queries is what decoding does.
DECODING = "dense: decoding step"


def decodes(new: int, total: int, scorer: Scorer) -> bool:
    """Whether fewer tokens than a block come after earlier ones, as when a guess is verified."""
    return total > new and new < scorer.block_size[0]


def why_dense(
    call: AttentionCall, scorer: Scorer, policy: Policy, min_tokens: int | None, known: Crossover | None
) -> tuple[str | None, ...]:
    """Return for every row of the batch why it is computed densely, or None.

    Sequences shorter than ``min_tokens`` are dense, all others sparse; None asks what is known of the device
    at hand, and where nothing is, everything is sparse.
    """

    def reason(new: int, total: int) -> str | None:
        if decodes(new, total, scorer):
            return DECODING
        tokens = call.prompt_tokens or total
        if min_tokens is not None:
            return f"dense: fewer than {min_tokens} tokens" if tokens < min_tokens else None
        if known is None:
            return None
        if tokens < known.dense_below:
            return f"dense: fewer than {known.dense_below} tokens ({known.source})"
        if new < total and call.prompt_tokens is None:
            # A later piece of a prompt: its dense computation needs a mask, and was not measured.
            return None
        block = scorer.block_size[1]
        density = policy.expected_density(num_blocks(tokens, block), block)
        if density is not None and density > (most := known.densest_at(tokens)):
            return f"dense: the policy reads {density:.0%}, dense is faster from {most:.0%} ({known.source})"
        return None

    found = {lengths: reason(*lengths) for lengths in set(call.lengths)}
    return tuple(found[lengths] for lengths in call.lengths)
