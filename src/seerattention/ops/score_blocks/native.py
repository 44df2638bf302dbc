"""x86-64 CPUs: products, maxima and shares in C++; ``choosing.cpp`` of `seerattention.ops.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.native import choosing, differentiated
from seerattention.ops.options import ScoreOptions
from seerattention.rows import num_blocks


def unsupported(queries: Tensor, keys: Tensor, options: ScoreOptions) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = choosing.unsupported(keys)
    if differentiated(queries, keys):
        reasons.append("it has no backward")
    return reasons


def run(queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:
    """Return the scores, fp32 ``[B, H, Nq, Nk]``."""
    rows, (subs_q, subs_k) = options.rows, options.sub_blocks
    down, across = num_blocks(queries.shape[2], subs_q), num_blocks(keys.shape[2], subs_k)
    scores = torch.empty((*queries.shape[:2], down, across), dtype=torch.float32)
    # Without rows every summary counts as a token.
    lengths = (queries.shape[2], keys.shape[2]) if rows is None else (rows.num_queries, rows.num_keys)
    size = options.sub_blocks if rows is None else options.block_size
    start = choosing.choose_op if torch.compiler.is_compiling() else choosing.choose
    start(
        queries, keys, scores, list(lengths), list(size), [subs_q, subs_k], rows is not None, options.shares,
        options.scale,
    )  # fmt: skip
    return scores
