"""A long prompt in pieces that select what the whole prompt would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from seerattention.hosts.transformers.attach import prompt_of, sparse_layer
from seerattention.hosts.transformers.intercept import cache_argument
from seerattention.policies import Policy


@torch.no_grad()
def prefill(
    model: nn.Module, input_ids: Tensor, past_key_values: Cache, *, piece_tokens: int = 8192, **inputs: Any
) -> Any:
    """Give an attached model a prompt in pieces, so that activations take the memory of one piece.

    The blocks read are those that the text given at once would read, cached tokens included: where these
    end inside a block, that block is completed first, by dense attention. A policy alone cannot know that:
    ``top_k`` follows the number of tokens so far, and ``dense_last_rows`` would hold in every piece. For
    that, a policy without `Policy.rule` must choose each row by itself.

    Args:
        model: A model with something attached.
        input_ids: int64 ``[B, T]``, without padding.
        past_key_values: The KV cache to fill; tokens already in it are the text's beginning.
        piece_tokens: Tokens per piece, rounded down to whole blocks. A remainder too short for a piece
            of its own goes with the last one.
        inputs: For every call of the model, e.g. ``logits_to_keep=1``.

    Returns:
        The model's output for the last piece.

    Raises:
        ValueError: If nothing is attached, a piece is smaller than a block, the prompt is empty, or
            ``inputs`` has a mask.
    """
    sparse = sparse_layer(model)
    if inputs.get("attention_mask") is not None:
        raise ValueError("prefill takes prompts without padding; give prompts of other lengths one by one")
    block = sparse.row_tokens
    if piece_tokens < block:
        raise ValueError(f"piece_tokens must be at least a block, {block} tokens, got {piece_tokens}")
    past, tokens = int(past_key_values.get_seq_length()), input_ids.shape[1]
    if not tokens:
        raise ValueError(f"empty prompt: input_ids is {list(input_ids.shape)}; give at least one token")
    head = min(-past % block, tokens)
    sizes = [head] if head else []
    if tokens > head:
        sizes += piece_sizes(tokens - head, piece_tokens, block, sparse.prefill.policy)
    inputs |= cache_argument(model, past_key_values)
    with prompt_of(model, past + tokens):
        for piece in input_ids.split(sizes, 1):
            output = model(piece, use_cache=True, **inputs)
    return output


def piece_sizes(tokens: int, piece_tokens: int, block: int, policy: Policy | None) -> list[int]:
    """Return sizes of pieces: whole blocks, and a last one that holds a block and all dense last rows."""
    piece = piece_tokens // block * block
    full, rest = divmod(tokens, piece)
    last_rows = 0 if policy is None else policy.dense_last_rows
    sizes = [piece] * full
    # Rows are counted from the first token, so only the last row can be short.
    while sizes and (rest < block or -(-rest // block) < last_rows):
        rest += sizes.pop()
    return [*sizes, rest]
