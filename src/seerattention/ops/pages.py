"""Keys and values in pages, ``[P, H, page, D]``: a block table says which ones are a sequence's, in order."""

from __future__ import annotations

from torch import Tensor

from seerattention.rows import num_blocks


def laid_out(x: Tensor, pages: Tensor, tokens: int) -> Tensor:
    """Copy the first tokens of sequences to one place, ``[B, H, tokens, D]``.

    Args:
        x: ``[P, H, page, D]``.
        pages: int32 ``[B, N]``; entries past the tokens are not read.
        tokens: How many.
    """
    used = pages[:, : num_blocks(tokens, x.shape[2])]
    return x[used.long()].transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def in_vectors(x: Tensor) -> Tensor:
    """Return ``x``, or a copy where its last dimension does not lie in whole vectors of memory."""
    whole = x.stride(3) == 1 and all(stride % x.shape[3] == 0 for stride in x.stride()[:3])
    return x if whole else x.contiguous()


def take(x: Tensor, pages: Tensor | int, heads: Tensor, places: Tensor) -> Tensor:
    """Return tokens ``[*shape, D]`` by their int64 pages, heads and places, which broadcast to the shape."""
    x, dim = in_vectors(x), x.shape[3]
    strides = x.stride()
    # As rows of one matrix, which are taken many times faster than by three indices.
    last = sum((size - 1) * stride for size, stride in zip(x.shape[:3], strides[:3], strict=True))
    rows = (pages * strides[0] + heads * strides[1] + places * strides[2]) // dim
    matrix = x.as_strided((last // dim + 1, dim), (dim, 1))
    return matrix.index_select(0, rows.flatten()).view(*rows.shape, dim)
