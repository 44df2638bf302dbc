"""A long prompt in pieces that select what the whole prompt would."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from seerattention.hosts.transformers.attach import prompt_of, sparse_layer
from seerattention.hosts.transformers.base import unwrapped
from seerattention.hosts.transformers.context import ContextParallelCache, refuse_unlike
from seerattention.hosts.transformers.intercept import cache_argument
from seerattention.hosts.transformers.logits import logits_of
from seerattention.hosts.transformers.support import MASKS
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
        past_key_values: The KV cache to fill; tokens already in it are the text's beginning. With an empty
            `ContextParallelCache` the processes of its mesh share the prompt: all of them call this with the
            whole prompt, which may then be a batch padded on either side, with an ``attention_mask``.
        piece_tokens: Tokens per piece, of each process, rounded down to whole blocks. A remainder too
            short for a piece of its own goes with the last one.
        inputs: For every call of the model, e.g. ``logits_to_keep=1``.

    Returns:
        The model's output for the last piece; of a prompt that processes share, the logits of each row's
        last token, ``[B, 1, vocabulary]``, on all of them.

    Raises:
        NotImplementedError: If a cache that is spread over processes holds something already, or the gates
            attached cannot be used with it.
        ValueError: If nothing is attached, a piece is smaller than a block, the prompt is empty, processes
            were given different ones, or ``inputs`` has a mask that the cache does not take.
    """
    sparse = sparse_layer(model)
    if isinstance(past_key_values, ContextParallelCache):
        return _prefill_spread(model, input_ids, past_key_values, piece_tokens, **inputs)
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


def _prefill_spread(
    model: nn.Module,
    input_ids: Tensor,
    cache: ContextParallelCache,
    piece_tokens: int,
    attention_mask: Tensor | None = None,
    logits_to_keep: int = 1,
    **inputs: Any,
) -> CausalLMOutputWithPast:
    """Give a prompt to the processes that share it, each its chunks of every piece."""
    if logits_to_keep != 1:
        raise ValueError(
            f"a prompt that processes share has the logits of its last token, not of {logits_to_keep}; "
            "leave logits_to_keep out"
        )
    base, sparse = unwrapped(model), sparse_layer(model)
    ids, lengths = _from_the_left(input_ids, attention_mask)
    refuse_unlike(ids, lengths, piece_tokens, cache.group)
    context = cache.begin(sparse, lengths, input_ids.shape[1], piece_tokens)
    most = piece_tokens * context.size
    sizes = piece_sizes(max(lengths), most, context.unit, sparse.prefill.policy)
    hidden = None
    for size in sizes:
        context.add_piece(size)
        parts, places = [], []
        for chunk in context.latest:
            here = ids[:, chunk.where]
            parts.append(F.pad(here, (0, chunk.tokens - here.shape[1])))
            places.append(torch.arange(chunk.first, chunk.first + chunk.tokens, device=ids.device))
        output = base.get_decoder()(
            input_ids=torch.cat(parts, 1),
            position_ids=torch.cat(places)[None].expand(len(ids), -1),
            use_cache=True,
            **cache_argument(model, cache),
            **inputs,
        ).last_hidden_state
        hidden = output.new_zeros(len(ids), 1, output.shape[2]) if hidden is None else hidden
        for chunk in context.latest:
            for row, length in enumerate(lengths):
                if 0 <= (place := length - 1 - chunk.first) < chunk.tokens:
                    hidden[row, 0] = output[row, chunk.place + place]
    assert hidden is not None
    logits = logits_of(base, context.summed(hidden))
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def _from_the_left(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """Return a batch whose rows begin in the first column, and how long they are."""
    if not ids.numel():
        raise ValueError(f"empty prompt: input_ids is {list(ids.shape)}; give at least one token")
    if mask is None:
        return ids, [ids.shape[1]] * len(ids)
    if mask.shape != ids.shape:
        raise ValueError(
            f"the attention mask must mark padding, {list(ids.shape)}, got {list(mask.shape)}; {MASKS}"
        )
    real = mask.bool()
    lengths = real.sum(1)
    begins = real.int().argmax(1)
    column = torch.arange(ids.shape[1], device=ids.device)
    fits = real == ((column >= begins[:, None]) & (column < (begins + lengths)[:, None]))
    if not bool(fits.all() & (lengths > 0).all()):
        raise ValueError("a prompt that processes share has padding on its left or right, and some tokens")
    columns = (column + begins[:, None]).clamp(max=ids.shape[1] - 1)
    return ids.gather(1, columns), lengths.tolist()


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
