"""Text and answers decoded step by step after a prompt, dense or with something attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from seerattention.hosts.transformers import LOGIT_ROWS, AttentionCall, cache_argument, logits_of
from seerattention.selection import BlockSelection

#: Tokens of a known text that are decoded in one call, by default: fewer than a block.
STEP = 32


class Reading:
    """An observer for `attach` that adds up how many key tokens decoded tokens read."""

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self.rows = 0

    @property
    def tokens(self) -> float:
        """Key tokens read by a query token, over heads, layers and steps; waits for the device."""
        return int(self._tokens) / self.rows if self.rows else 0.0

    @torch.inference_mode()
    def __call__(self, layer: int, call: AttentionCall, selection: BlockSelection) -> None:
        """Add one layer's call; the signature of `attach`'s observer."""
        size, block = selection.block_size
        if size != 1:
            return
        # Of its own block a token reads what is before it.
        after = block - 1 - call.positions % block
        self._tokens = self._tokens + (selection.counts * block - after).sum(dtype=torch.int64)
        self.rows += selection.counts.numel()


class Continuation(NamedTuple):
    """What a model makes of texts after their prompts.

    Attributes:
        losses: fp32 ``[B, n]``, every token's cross-entropy given the ones before it, in nats.
        predicted: int64 ``[B, n]``, the most likely token in the place of each.
    """

    losses: Tensor
    predicted: Tensor


@torch.inference_mode()
def continued(model: PreTrainedModel, tokens: np.ndarray, prompt: int, *, step: int = STEP) -> Continuation:
    """Give a model the beginning of texts at once and the rest in steps, as when it decodes them.

    Args:
        model: A causal language model, with or without something attached.
        tokens: int ``[B, T]``.
        prompt: Tokens given at once, 1 to ``T - 1``.
        step: Tokens of every later call; fewer than a block, each reads what it would read alone.

    Raises:
        ValueError: If there is no prompt, or nothing after it.
    """
    if not 1 <= prompt < tokens.shape[1]:
        raise ValueError(f"a prompt has 1 to {tokens.shape[1] - 1} of these tokens, got {prompt}")
    ids, run = _ids(model, tokens), _runner(model)
    hidden = [run(ids[:, :prompt])[:, -1:]]
    # What follows the last token nobody asks.
    hidden += [run(part) for part in ids[:, prompt:-1].split(step, 1) if part.shape[1]]
    targets, losses, predicted = ids[:, prompt:], [], []
    for part, target in zip(
        torch.cat(hidden, 1).flatten(0, 1).split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS), strict=True
    ):
        logits = logits_of(model, part).float()
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        predicted.append(logits.argmax(-1))
    return Continuation(*(torch.cat(found).view(targets.shape) for found in (losses, predicted)))


@torch.inference_mode()
def answers(model: PreTrainedModel, prompts: Sequence[np.ndarray], new_tokens: int) -> list[list[int]]:
    """Return the most likely next tokens of every prompt, up to the model's end token.

    Args:
        model: A causal language model, with or without something attached.
        prompts: int ``[T]`` each; those of one length are answered together, without padding.
        new_tokens: The most that an answer has.
    """
    found: list[list[int]] = [[] for _ in prompts]
    lengths: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(index)
    for some in lengths.values():
        made = _greedy(model, np.stack([prompts[index] for index in some]), new_tokens)
        for index, tokens in zip(some, made, strict=True):
            found[index] = tokens
    return found


def _greedy(model: PreTrainedModel, prompts: np.ndarray, new_tokens: int) -> list[list[int]]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])
    run, ids, made = _runner(model), _ids(model, prompts), []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(new_tokens):
        ids = logits_of(model, run(ids)[:, -1:]).argmax(-1)
        made.append(ids[:, 0].cpu())
        ended |= torch.isin(made[-1], ends)
        if bool(ended.all()):
            break
    tokens = torch.stack(made, 1)
    stops = torch.isin(tokens, ends).int().cummax(1).values.sum(1)
    return [row[: len(row) - int(stop)].tolist() for row, stop in zip(tokens, stops, strict=True)]


def _ids(model: PreTrainedModel, tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(model.device)


def _runner(model: PreTrainedModel) -> Any:
    """Return what gives the model's decoder tokens after all earlier ones, and returns its hidden states."""
    cached = cache_argument(model, DynamicCache(config=model.config))
    return lambda ids: model.get_decoder()(ids, use_cache=True, **cached).last_hidden_state
