"""Perplexity of consecutive windows of a text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.hosts.transformers import LOGIT_ROWS, logits_of


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, tokens: np.ndarray, **kwargs: Any) -> Tensor:
    """Return the last hidden states ``[T, hidden]`` of one sequence, without any logits."""
    ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(model.device)[None]
    return model.get_decoder()(ids, **{"use_cache": False, **kwargs}).last_hidden_state[0]


@torch.inference_mode()
def token_losses(model: PreTrainedModel, hidden: Tensor, tokens: np.ndarray) -> Tensor:
    """Return each token's cross-entropy given the ones before it, fp32 ``[T - 1]``, in nats.

    Args:
        model: A causal language model.
        hidden: Its last hidden states, ``[T, hidden]``.
        tokens: int ``[T]``, at least two.

    Raises:
        ValueError: If there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"perplexity needs at least two tokens, got {len(tokens)}")
    targets = torch.from_numpy(np.ascontiguousarray(tokens[1:], dtype=np.int64)).to(hidden.device)
    losses = [
        F.cross_entropy(logits_of(model, part).float(), target, reduction="none")
        for part, target in zip(hidden[:-1].split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses)


def next_token_losses(model: PreTrainedModel, tokens: np.ndarray) -> Tensor:
    """Return `token_losses` of a sequence, int ``[T]``, that the model is run on."""
    return token_losses(model, hidden_states(model, tokens), tokens)


def perplexity(model: PreTrainedModel, tokens: np.ndarray, *, window: int, windows: int) -> float:
    """Return the perplexity over consecutive windows of a text.

    Args:
        model: A causal language model, with or without gates attached.
        tokens: int ``[n]``.
        window: Tokens per window.
        windows: How many, from the start of ``tokens``.

    Raises:
        ValueError: If the text is shorter than the windows.
    """
    if len(tokens) < window * windows:
        raise ValueError(f"{windows} windows of {window} tokens need {window * windows}, got {len(tokens)}")
    losses = [next_token_losses(model, tokens[i * window : (i + 1) * window]) for i in range(windows)]
    return math.exp(float(torch.cat(losses).double().mean()))
