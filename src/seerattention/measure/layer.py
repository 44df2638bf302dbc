"""A sparse layer taken apart, to time choosing blocks and attention over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seerattention.attention import select_blocks
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.policies import Policy
from seerattention.rows import Rows
from seerattention.scorer import Scorer
from seerattention.selection import BlockSelection


def sparse_parts(
    qkv: tuple[Tensor, Tensor, Tensor],
    scored: tuple[Tensor, Tensor],
    scorer: Scorer,
    policy: Policy,
    backend: str = "auto",
) -> tuple[BlockSelection, dict[str, Callable[[], object]]]:
    """Return what a layer reads of a whole prompt, and what computes each part of it.

    Args:
        qkv: q ``[B, Hq, T, D]``, k and v ``[B, Hk, T, D]``.
        scored: q and k as the scorer reads them.
        scorer: Ranks the blocks.
        policy: How many of them to read.
        backend: A backend of `block_sparse_attention`.

    Returns:
        The selection; and ``selection``, which summarises, scores and selects, ``attention`` over that
        selection, and ``total``, both.
    """
    tokens = qkv[0].shape[2]
    rows, positions = Rows.last(tokens, tokens), torch.arange(tokens, device=qkv[0].device)

    def choose() -> BlockSelection:
        k_blocks = scorer.compress(scored[1], positions=positions)
        return select_blocks(scored[0], k_blocks, scorer, policy, positions=positions, rows=rows)

    def attend(selection: BlockSelection) -> Tensor:
        return block_sparse_attention(*qkv, selection, backend=backend)

    selection = choose()
    return selection, {
        "selection": choose,
        "attention": lambda: attend(selection),
        "total": lambda: attend(choose()),
    }
