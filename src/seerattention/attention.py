"""The method in two calls, select and attend; examples/method.py has every step of it in plain PyTorch.

Dense attention reads every earlier token. SeerAttention first asks a small gate which blocks of
tokens matter, then reads only those:

    q, k before RoPE -> scorer -> scores per block pair -> policy -> BlockSelection -> sparse kernel

The scorer is the learned gate (`seerattention.gate`) or any baseline (`seerattention.baselines`), the
policy any of `seerattention.policies`. Both steps are ops with several backends (`seerattention.ops`):
`select_blocks` makes the selection, `ops/select_blocks/reference.py` says how, and
`block_sparse_attention` reads it.
"""

from __future__ import annotations

from torch import Tensor

from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.select_blocks import select_blocks as select_blocks
from seerattention.policies import Policy
from seerattention.rows import Rows
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection


def seer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scorer: Scorer,
    policy: Policy,
    *,
    q_scored: Tensor,
    k_blocks: Tensor,
    rows: Rows | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, BlockSelection]:
    """Compute causal attention over the blocks that a scorer and a policy choose.

    Args:
        q: Queries after the rotary embedding, ``[B, Hq, Tq, D]``.
        k: Keys after the rotary embedding, ``[B, Hk, Tk, D]``.
        v: Values, ``[B, Hk, Tk, D]``.
        scorer: Ranks the blocks.
        policy: Decides how many of them to take.
        q_scored: The queries as the scorer reads them: before the rotary embedding for the gate.
        k_blocks: The keys' summaries, from ``scorer.compress``.
        rows: Where the queries lie among the keys; default they are the last ``Tq`` of ``Tk`` tokens.
        positions: int64 ``[Tq]`` or ``[B, Tq]``, the queries' positions; default their places among the keys.
        scale: Softmax scale; default ``D ** -0.5``.
        softcap: See `block_sparse_attention`.
        sinks: See `block_sparse_attention`.
        backend: A backend of `block_sparse_attention`.

    Returns:
        The output ``[B, Hq, Tq, D]`` and the blocks that were read.
    """
    rows = Rows.last(q.shape[2], k.shape[2]) if rows is None else rows
    selection = select_blocks(q_scored, k_blocks, scorer, policy, rows=rows, positions=positions)
    out = block_sparse_attention(
        q,
        k,
        v,
        selection,
        rows=rows,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        backend=backend,
    )
    return out, selection
