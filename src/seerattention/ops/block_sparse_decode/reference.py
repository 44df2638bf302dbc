"""The specification: attention of the last queries of every sequence, one sequence after another."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import reference
from seerattention.ops.options import DecodeOptions, Options
from seerattention.rows import Rows, num_blocks
from seerattention.selection import BlockSelection


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: DecodeOptions
) -> list[str]:
    """Return the reasons why this backend cannot run; it runs everything."""
    return []


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: DecodeOptions
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    if options.sinks is not None:
        lse[:] = options.sinks[:, None]
    mask = selection.to_mask().expand(len(q), -1, -1, -1)
    held, starts = options.held(len(q)), options.first_keys(len(q))
    for b, (start, length) in enumerate(zip(starts, held, strict=True)):
        # A sequence shorter than its queries: the first of them see nothing.
        rows = min(q.shape[2], length)
        if rows:
            own = mask[b : b + 1, :, -rows:, : num_blocks(length, selection.block_size[1])]
            chosen = BlockSelection.from_mask(own, selection.block_size, check=False)
            keys, values, pages = k, v, options.pages
            if pages is None:
                keys, values = (x[b : b + 1, :, start : start + length] for x in (k, v))
            asked = Options(
                rows=Rows.last(rows, length),
                pages=None if pages is None else pages[b : b + 1],
                scale=options.scale,
                softcap=options.softcap,
                sinks=options.sinks,
                return_lse=True,
            )
            own_out, own_lse = reference.run(q[b : b + 1, :, -rows:], keys, values, chosen, asked)
            assert own_lse is not None
            out[b, :, -rows:], lse[b, :, -rows:] = own_out[0], own_lse[0]
    return out, lse if options.return_lse else None
