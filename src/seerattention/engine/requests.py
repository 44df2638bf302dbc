"""A request of a serving engine: a layer's new tokens, cut where what chooses for them changes."""

from __future__ import annotations

from collections.abc import MutableMapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seerattention.engine.call import AttentionCall, Choices, Given
from seerattention.engine.layer import SparseLayer
from seerattention.rows import Rows


def parts(past: int, new: int, prompt: int, block: int) -> list[tuple[int, int]]:
    """Cut a request's new tokens where its prompt ends, and where the block ends that earlier ones began.

    Args:
        past: Tokens before them.
        new: Their number.
        prompt: Tokens of the whole prompt.
        block: Query tokens per block.

    Returns:
        Where each part begins and ends, as positions in the request.
    """
    cuts = {cut for cut in (prompt, -(-past // block) * block) if past < cut < past + new}
    return list(pairwise(sorted({past, past + new, *cuts})))


def attend_request(
    handler: SparseLayer,
    layer: int,
    given: Given,
    prompt: int,
    *,
    positions: Tensor,
    chosen: MutableMapping[int, Choices],
    **options: Any,
) -> Tensor:
    """Compute a layer for a request's new tokens.

    Its blocks are counted from its first token, and its budget is that of the whole prompt, also where an
    engine gives it in pieces. Where one ends inside a block all the same, the first part of the block
    chooses by the tokens it has and the rest is dense. What comes after the prompt is decoded, densely.

    Args:
        handler: Computes the parts.
        layer: Layer index.
        given: The request's tensors, of one batch entry; keys and values from its first token on.
        prompt: Tokens of the whole prompt.
        positions: int64 ``[1, Tq]``, at which the new tokens were rotated.
        chosen: What earlier layers chose in this forward pass for the parts of the request that begin at
            these positions; parts are added.
        options: For every part, e.g. ``scale``.

    Returns:
        The output, of ``given.q``'s shape.
    """
    new, keys = given.q.shape[2], given.k.shape[2]
    past, block = keys - new, handler.prefill.scorer(layer).block_size[0]
    outs = []
    for begin, end in parts(past, new, prompt, block):
        now = slice(begin - past, end - past)
        q, q_nope, k_nope = (x[:, :, now] for x in (given.q, given.q_nope, given.k_nope))
        outs.append(
            handler(
                AttentionCall(
                    layer=layer,
                    given=Given(q, given.k[:, :, :end], given.v[:, :, :end], q_nope, k_nope),
                    rows=Rows.last(end - begin, end),
                    position_ids=positions[:, now],
                    prompt_tokens=prompt,
                    chosen=chosen.setdefault(begin, {}),
                    **options,
                )
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)
