"""A model's logits from its last hidden states: the head, and what some models do behind it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Tokens of a slice: logits of a long text are never held at once.
LOGIT_ROWS = 2048


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the logits of last hidden states, as the model's own forward pass computes them.

    The output head alone is not enough: granite divides its logits, cohere multiplies them, and gemma
    soft-caps them. Which, the configuration says.

    Args:
        model: A causal language model.
        hidden: ``[..., hidden]``, what its decoder returns as ``last_hidden_state``, or a slice of
            that: `LOGIT_ROWS` tokens at a time keep the memory of a long text small.

    Returns:
        ``[..., vocabulary]``, in the head's dtype.
    """
    head = model.get_output_embeddings()
    assert head is not None
    config, logits = model.config.get_text_config(), head(hidden)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits
