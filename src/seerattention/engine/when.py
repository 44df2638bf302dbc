"""Sparse or dense: which sequences of a call are computed densely, and why."""

from __future__ import annotations

from seerattention.crossover import Crossover
from seerattention.engine.call import AttentionCall
from seerattention.policies import Policy, rule_of
from seerattention.rows import num_blocks
from seerattention.scorer import Scorer

#: Why a short piece after a long text is dense: reading all keys for few queries is what decoding does.
DECODING = "dense: decoding step"

#: Why a prompt is dense where a policy is given for decoding alone.
PREFILL = "dense: no policy for prefill"


def decodes(new: int, total: int, scorer: Scorer, prompt_tokens: int | None = None) -> bool:
    """Whether new tokens after earlier ones are a step of decoding, or are computed like one.

    Those are fewer tokens than a block, as when a guess is verified; where a prompt's length is known, what
    comes after the prompt, and what completes a block of it that the piece before began.
    """
    past, block = total - new, scorer.block_size[0]
    if prompt_tokens is None:
        return past > 0 and new < block
    return past >= prompt_tokens or (past % block > 0 and new < block)


def why_dense(
    call: AttentionCall,
    scorer: Scorer,
    policy: Policy | None,
    min_tokens: int | None,
    known: Crossover | None,
) -> tuple[str | None, ...]:
    """Return for every row of the batch why it is computed densely, or None.

    Sequences shorter than ``min_tokens`` are dense, all others sparse; None asks what is known of the device
    at hand, and where nothing is, everything is sparse.
    """

    def reason(new: int, total: int) -> str | None:
        if decodes(new, total, scorer, call.prompt_tokens):
            return DECODING
        if policy is None:
            return PREFILL
        # A later piece of a prompt: its dense computation needs a mask, and was not measured.
        later = new < total and call.prompt_tokens is None
        tokens = call.prompt_tokens or total
        return why_dense_prompt(tokens, policy, scorer.block_size[1], min_tokens, known, by_density=not later)

    found = {lengths: reason(*lengths) for lengths in set(call.lengths)}
    return tuple(found[lengths] for lengths in call.lengths)


def why_dense_prompt(
    tokens: int,
    policy: Policy,
    block: int,
    min_tokens: int | None,
    known: Crossover | None,
    *,
    by_density: bool = True,
) -> str | None:
    """Return why a prompt is computed densely, or None.

    Args:
        tokens: Of the whole prompt.
        policy: The policy for prefill.
        block: Key tokens per block.
        min_tokens: See `why_dense`.
        known: See `why_dense`.
        by_density: Whether it may be for how much the policy reads.
    """
    if min_tokens is not None:
        return f"dense: fewer than {min_tokens} tokens" if tokens < min_tokens else None
    if known is None:
        return None
    if tokens < known.dense_below:
        return f"dense: fewer than {known.dense_below} tokens ({known.source})"
    if not by_density:
        return None
    density = policy.expected_density(num_blocks(tokens, block), block)
    if density is not None and density > (most := known.densest_at(tokens)):
        return f"dense: the policy reads {density:.0%}, dense is faster from {most:.0%} ({known.source})"
    return None


def why_dense_step(
    tokens: int, policy: Policy, block: int, min_tokens: int | None, known: Crossover | None
) -> str | None:
    """Return why a step of decoding is computed densely, or None.

    Args:
        tokens: Keys of the longest sequence.
        policy: The policy for decoding.
        block: Key tokens per block.
        min_tokens: See `why_dense`.
        known: See `why_dense`.
    """
    if min_tokens is not None:
        return f"{DECODING}, fewer than {min_tokens} tokens" if tokens < min_tokens else None
    if known is not None and tokens < known.decode_dense_below:
        return f"{DECODING}, fewer than {known.decode_dense_below} tokens ({known.source})"
    blocks = num_blocks(tokens, block)
    rule = rule_of(policy, blocks, block)
    count = rule.value if rule is not None and rule.kind == "count" else 0
    if max(count, policy.sink_blocks + policy.local_blocks) >= blocks:
        return f"{DECODING}, the policy reads everything"
    return None
