"""From products of summaries to scores of the blocks that hold them."""

from __future__ import annotations

from torch import Tensor

from seerattention.ops.attention_scores import by_block


def max_over_sub_blocks(products: Tensor, subs_q: int, subs_k: int) -> Tensor:
    """Reduce ``[..., Nq * subs_q, Nk * subs_k]`` (the last block possibly short) to ``[..., Nq, Nk]``."""
    learns = products.requires_grad
    # Rows first is faster, as their elements lie side by side; columns first gives a gradient to the first of
    # equal pairs in memory order.
    for dim, subs in ((-1, subs_k), (-2, subs_q)) if learns else ((-2, subs_q), (-1, subs_k)):
        if subs == 1:
            continue
        products = by_block(products, subs, dim, float("-inf"))
        # amax, faster, would share a gradient among equals; max gives it to the first of them.
        products = products.max(dim).values if learns else products.amax(dim)
    return products
