"""START HERE: the whole method on one page.

Dense attention reads every earlier token. SeerAttention first asks a small gate which blocks of
tokens matter, then reads only those:

    q, k before RoPE -> scorer -> scores per block pair -> policy -> BlockSelection -> sparse kernel

The scorer is the learned gate (`seerattention.gate`) or any baseline (`seerattention.baselines`), the
policy any of `seerattention.policies`, the kernel any backend of `seerattention.ops`.
"""

from __future__ import annotations

from torch import Tensor

from seerattention.gate import Scorer
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.policies import Policy, select
from seerattention.selection import BlockSelection, causal_blocks


def select_blocks(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Scorer,
    policy: Policy,
    *,
    positions: Tensor,
    num_keys: int,
) -> BlockSelection:
    """Choose the KV blocks that each query block reads.

    Args:
        q: ``[B, Hq, Tq, D]``, the last ``Tq`` of ``num_keys`` tokens; before the rotary embedding,
            or after it if ``scorer.after_rope``.
        k_blocks: Summaries of all ``num_keys`` keys, from ``scorer.compress``.
        scorer: Ranks the blocks.
        policy: Decides how many of them to take.
        positions: int64 ``[Tq]`` or ``[B, Tq]``, the queries' positions.
        num_keys: Key tokens, ``Tk``.

    Returns:
        The selection; never empty, never acausal.
    """
    valid = causal_blocks(q.shape[2], num_keys, scorer.block_size, q.device)
    scores = scorer.score(q, k_blocks, positions=positions, valid=valid)
    return select(policy, scores, num_queries=q.shape[2], num_keys=num_keys, block_size=scorer.block_size)


def seer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scorer: Scorer,
    policy: Policy,
    *,
    q_scored: Tensor,
    k_blocks: Tensor,
    positions: Tensor,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, BlockSelection]:
    """Compute causal attention over the blocks that a scorer and a policy choose.

    Args:
        q: Queries after the rotary embedding, ``[B, Hq, Tq, D]``, the last ``Tq`` of ``Tk`` tokens.
        k: Keys after the rotary embedding, ``[B, Hk, Tk, D]``.
        v: Values, ``[B, Hk, Tk, D]``.
        scorer: Ranks the blocks.
        policy: Decides how many of them to take.
        q_scored: The queries as the scorer reads them: before the rotary embedding for the gate.
        k_blocks: The keys' summaries, from ``scorer.compress``.
        positions: int64 ``[Tq]`` or ``[B, Tq]``, the queries' positions.
        scale: Softmax scale; default ``D ** -0.5``.
        backend: A backend of `block_sparse_attention`.

    Returns:
        The output ``[B, Hq, Tq, D]`` and the blocks that were read.
    """
    selection = select_blocks(q_scored, k_blocks, scorer, policy, positions=positions, num_keys=k.shape[2])
    out = block_sparse_attention(q, k, v, selection, scale=scale, backend=backend)
    return out, selection
