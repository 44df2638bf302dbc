"""Fill what a selection does not read with NaN: a kernel that touches it cannot hide it."""

from __future__ import annotations

from torch import Tensor

from seerattention.selection import BlockSelection


def unread_tokens(selection: BlockSelection, kv_heads: int, num_keys: int) -> Tensor:
    """Mark the key tokens that no query of a KV head reads.

    Args:
        selection: The blocks that are read.
        kv_heads: KV heads, ``Hk``; ``Hq`` marks what each query head does not read, for keys and
            values expanded to query heads.
        num_keys: Key tokens, ``Tk``.

    Returns:
        bool ``[B, Hk, Tk]``, B being the selection's.
    """
    read = selection.to_mask().any(2)
    b, h, nk = read.shape
    if h > kv_heads:
        read = read.view(b, kv_heads, h // kv_heads, nk).any(2)
    else:
        read = read.repeat_interleave(kv_heads // h, 1)
    return ~read.repeat_interleave(selection.block_size[1], -1)[..., :num_keys]


def poison(k: Tensor, v: Tensor, selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """Return copies of k and v with NaN in every token that `unread_tokens` marks.

    Where queries and keys are of one length, each block is some row's own and nothing is marked: take
    fewer queries than keys.

    Args:
        k: ``[B, Hk, Tk, D]``, or ``[B, Hq, Tk, D]`` if expanded to query heads.
        v: The same shape.
        selection: The blocks that are read.
    """
    unread = unread_tokens(selection, k.shape[1], k.shape[2])[..., None]
    return k.masked_fill(unread, float("nan")), v.masked_fill(unread, float("nan"))
