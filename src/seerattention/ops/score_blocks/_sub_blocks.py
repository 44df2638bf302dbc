"""From products of summaries to scores of the blocks that hold them."""

from __future__ import annotations

from torch import Tensor

from seerattention.ops.attention_scores import by_block


def max_over_sub_blocks(products: Tensor, subs_q: int, subs_k: int) -> Tensor:
    """Reduce ``[..., Nq * subs_q, Nk * subs_k]`` (the last block possibly short) to ``[..., Nq, Nk]``."""
    # Rows first is faster, as their elements lie side by side; columns first gives a gradient to the first of
    # equal pairs in memory order.
    learns = products.requires_grad
    for dim, subs in ((-1, subs_k), (-2, subs_q)) if learns else ((-2, subs_q), (-1, subs_k)):
        products = _largest(products, subs, dim)
    return products


def shares_of_sub_blocks(products: Tensor, seen: Tensor | None, subs_q: int, subs_k: int) -> Tensor:
    """Reduce the same to the logarithm of the largest share that a query summary gives a block.

    A summary's shares are the softmax over blocks of its largest product in each, among the keys' summaries
    that it sees: bool ``[Nq * subs_q, Nk * subs_k]``, None for all. -inf where no summary sees a block.
    """
    if seen is not None:
        products = products.masked_fill(~seen, float("-inf"))
    return _largest(_largest(products, subs_k, -1).log_softmax(-1), subs_q, -2)


def shares_by_keys(products: Tensor, subs_q: int, subs_k: int) -> Tensor:
    """Do the same to ``[..., Nk * subs_k, H, Nq * subs_q]``, masked already; return ``[..., H, Nq, Nk]``.

    A CPU reduces sub-blocks of keys three times as fast where these do not lie side by side.
    """
    shares = _largest(products, subs_k, -3).log_softmax(-3)
    return _largest(shares, subs_q, -1).movedim(-3, -1)


def _largest(x: Tensor, size: int, dim: int) -> Tensor:
    """Return the largest of every ``size`` entries along a dimension, the last ones possibly fewer."""
    if size == 1:
        return x
    x = by_block(x, size, dim, float("-inf"))
    # amax, faster, would share a gradient among equals; max gives it to the first of them.
    return x.max(dim).values if x.requires_grad else x.amax(dim)
