"""A Triton kernel for any GPU: the lists of a step are split over programs, whose parts a second one merges.

A program takes its share of what one token selected from one KV head, with the group's query heads as the
rows of its tile. Lengths, pages and bits are read on the device; how many programs there are follows from
shapes alone, so that a captured graph goes on over growing sequences. Design and roofline: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention.kernels.backward import bit_strides
from seerattention.ops.block_sparse_decode._triton_kernel import decode_kernel, merge_kernel
from seerattention.ops.language import padded, power_of_two, unsupported_attention
from seerattention.ops.launch import Launch, overlapping, positive
from seerattention.ops.options import DecodeOptions
from seerattention.selection import BlockSelection

BLOCKS = (16, 32, 64, 128)
#: Programs that share what one token reads from one KV head, at the most.
MOST_SPLITS = 64
#: Words of a row of bits that a program looks at together, at the most.
MOST_WORDS = 32

#: By bytes per element and padded head dimension: a launch for lists in parts, one for whole lists. A tile's
#: rows are the heads of a group, 16 at least.
LAUNCHES = {
    (2, 64): (Launch(16, 64, 4, 3, 1), Launch(16, 64, 4, 4, 1)),
    (2, 128): (Launch(16, 64, 4, 3, 1), Launch(16, 64, 4, 4, 1)),
    (2, 256): (Launch(16, 32, 4, 3, 1),),
    (4, 64): (Launch(16, 32, 4, 2, 1),),
    (4, 128): (Launch(16, 32, 4, 2, 1),),
    (4, 256): (Launch(16, 16, 4, 2, 1),),
}


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: DecodeOptions
) -> list[str]:
    """Return the reasons why this backend cannot run."""
    tensors = {"k": k, "v": v, "selection.bits": selection.bits, "sinks": options.sinks}
    tensors |= {"lengths": options.lengths, "pages": options.pages, "starts": options.starts}
    reasons = unsupported_attention(q, **tensors)
    if selection.block_size[1] not in BLOCKS:
        allowed = ", ".join(map(str, BLOCKS))
        reasons.append(f"KV blocks must have one of {allowed} tokens, got {selection.block_size[1]}")
    return reasons


def splits_of(items: int, blocks: int, programs: int) -> int:
    """Return into how many parts each of ``items`` lists of at most ``blocks`` is split, a power of two."""
    if 2 * items > programs:
        # Halves would save less than merging them costs.
        return 1
    return min(MOST_SPLITS, power_of_two(blocks), power_of_two(-(-programs // items)))


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: DecodeOptions
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked."""
    q, options = positive(q, options)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3] if options.return_lse else (0,), dtype=torch.float32)
    batch, heads, tokens, head_dim = q.shape
    bits, block = selection.bits, selection.block_size[1]
    lists = heads if bits.shape[1] == heads else k.shape[1]
    group, columns = heads // lists, selection.shape[3]
    choices = LAUNCHES[q.element_size(), max(64, power_of_two(head_dim))]
    items = batch * lists * tokens
    splits = splits_of(items, columns, choices[0].most_programs(q.device))
    launch = choices[-1 if splits == 1 else 0]
    launch = replace(launch, block_m=max(16, power_of_two(group)), block_n=min(launch.block_n, block))
    # Every program's list and its pages, and one entry more each, which are read ahead.
    scratch = torch.empty(items * splits * 2 * (columns + 1), dtype=torch.int32, device=q.device)
    parts = q.new_empty((items, splits, group, head_dim) if splits > 1 else (0,), dtype=torch.float32)
    state = q.new_empty((items, splits, 2, group) if splits > 1 else (0,), dtype=torch.float32)
    shape = {"HEADS": heads, "LISTS": lists, "D": head_dim, "BLOCK_D": padded(head_dim), "SPLITS": splits}
    shape |= {"SOFTCAP": options.softcap is not None, "LSE": options.return_lse}
    shape |= overlapping(q.device)
    pages = options.pages
    # Triton launches on the current device. A tensor that is not used still needs a pointer.
    with torch.cuda.device_of(q):
        decode_kernel[(items, splits)](
            q,
            k,
            v,
            out,
            lse,
            parts,
            state,
            bits,
            scratch,
            *(scratch if x is None else x for x in (options.sinks, options.lengths, options.starts, pages)),
            *(x.stride()[:3] for x in (q, k, v, out)),
            *bit_strides(bits),
            0 if pages is None else pages.stride(0),
            columns,
            tokens,
            k.shape[2],
            options.scale,
            options.softcap or 0.0,
            KV_HEADS=k.shape[1],
            BIT_HEADS=bits.shape[1],
            BLOCK_K=block,
            PAGE=0 if pages is None else k.shape[2] // block,
            WORDS=min(MOST_WORDS, power_of_two(bits.shape[3])),
            LENGTHS=options.lengths is not None,
            STARTS=options.starts is not None,
            SINKS=options.sinks is not None,
            STAGES=launch.stages,
            **shape,
            **launch.tile(),
        )
        if splits > 1:
            merge_kernel[(items, group)](
                parts, state, out, lse, out.stride()[:3], tokens, options.scale,
                EXACT=q.dtype == torch.float32, **shape,
            )  # fmt: skip
    return out, lse if options.return_lse else None
