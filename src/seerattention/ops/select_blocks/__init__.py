"""From queries and key summaries to the blocks that each query block reads."""

from __future__ import annotations

from torch import Tensor

from seerattention.ops.dispatch import choose, load_backends, outside_autocast
from seerattention.policies import Policy
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order.
ORDER = ("hopper", "triton", "native", "composed")


@outside_autocast
def select_blocks(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Scorer,
    policy: Policy,
    *,
    rows: Rows | None = None,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> BlockSelection:
    """Choose the KV blocks that each query block reads.

    Args:
        q: ``[B, Hq, Tq, D]``, before the rotary embedding, or after it if ``scorer.after_rope``; packed
            sequences behind one another, ``[1, Hq, Tq, D]``.
        k_blocks: Summaries of all keys, from ``scorer.compress``; of packed sequences ``[S, H, longest, E]``,
            one below the other (``Rows.rectangle``), where what a shorter one leaves is not read.
        scorer: Ranks the blocks.
        policy: Decides how many of them to take; asked per sequence.
        rows: Where the queries lie among the keys; default they are the tokens of all keys.
        positions: int64 ``[Tq]`` or ``[B, Tq]``, each query's position in its sequence; default its place
            among the keys.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises. Backends choose alike
            but for blocks whose scores are within rounding of the row's limit.

    Returns:
        The selection; never empty, never acausal. No gradient passes it.

    Raises:
        ValueError: If the lengths do not fit or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3 (arXiv 2410.13276).
    """
    rows = Rows.last(q.shape[2], q.shape[2]) if rows is None else rows
    if positions is None:
        positions = rows.positions(q.device)
    k_blocks = _fitting(q, k_blocks, scorer, rows)
    args = {"q": q, "k_blocks": k_blocks, "scorer": scorer, "policy": policy, "rows": rows}
    module = choose(BACKENDS, ORDER, backend, **args)
    return module.run(**args, positions=positions)


def _fitting(q: Tensor, k_blocks: Tensor, scorer: Scorer, rows: Rows) -> Tensor:
    """Return the summaries of the keys that queries may see, and no others."""
    if q.shape[2] != rows.num_queries:
        raise ValueError(f"q has {q.shape[2]} tokens, rows have {rows.num_queries}")
    longest = max(keys for _, keys in rows.known)
    most = num_blocks(longest, scorer.tokens_per_summary)
    batch = (1, len(rows.known)) if rows.is_packed else (q.shape[0],) * 2
    if (q.shape[0], k_blocks.shape[0]) != batch or k_blocks.shape[2] < most:
        raise ValueError(
            f"k_blocks must be [{batch[1]}, H, {most}, E] for q [{batch[0]}, ...] and the {longest} keys of "
            f"{'the longest sequence' if rows.is_packed else 'rows'}, got {list(k_blocks.shape)}"
        )
    return k_blocks[:, :, :most]
