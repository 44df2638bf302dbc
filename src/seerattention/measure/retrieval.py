"""Needle retrieval: whether a model still finds numbers hidden in a long text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.hosts.transformers import logits_of
from seerattention.measure.needle import NeedleDocument
from seerattention.measure.perplexity import hidden_states


@torch.inference_mode()
def predictions(model: PreTrainedModel, document: NeedleDocument, hidden: Tensor | None = None) -> np.ndarray:
    """Return the most likely next token at each of a document's ``query_positions``, int64, in one pass.

    Args:
        model: A causal language model, with or without gates attached.
        document: From `NeedleTask.make`.
        hidden: The document's last hidden states, ``[T, hidden]``, where they are known.
    """
    hidden = hidden_states(model, document.tokens) if hidden is None else hidden
    where = torch.from_numpy(document.query_positions).to(hidden.device)
    return np.asarray(logits_of(model, hidden[where]).argmax(-1).cpu())


def retrieval(
    model: PreTrainedModel, documents: Sequence[NeedleDocument], step: Callable[[], None] = lambda: None
) -> float:
    """Return the fraction of all answers that the model predicts right in every digit.

    Args:
        model: A causal language model, with or without gates attached.
        documents: From `NeedleTask.make`, each run in one pass.
        step: Called after each.
    """
    correct = 0
    for document in documents:
        correct += document.correct(predictions(model, document))
        step()
    return correct / sum(len(d.answers) for d in documents)


def understood(
    model: PreTrainedModel,
    documents: Mapping[str, Sequence[NeedleDocument]],
    step: Callable[[], None] = lambda: None,
) -> tuple[str, float]:
    """Return the wording that a model answers best, the first of equals, and the fraction predicted right.

    Args:
        model: A causal language model, nothing attached.
        documents: From `NeedleTask.make`, by the name of their wording.
        step: Called after each document.
    """
    found = {name: retrieval(model, asked, step) for name, asked in documents.items()}
    best = max(found, key=lambda name: found[name])
    return best, found[best]
