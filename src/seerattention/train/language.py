"""The language-model loss of long sequences: logits of a few tokens at a time, never of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from seerattention.hosts.transformers import LOGIT_ROWS, logits_of

#: Target of a token that is not predicted.
IGNORED = -100


class LanguageLoss(nn.Module):
    """Runs a causal language model up to the sum of its tokens' losses.

    It is what FSDP2 wraps, since the head's weights may be those of the embedding. What routers of experts
    add to the loss of some models is no part of it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def decode(self, tokens: Tensor, **kwargs: Any) -> Any:
        """Run the decoder, without the head."""
        return self.model.get_decoder()(tokens, **kwargs)

    def forward(self, tokens: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
        """Return the summed cross-entropy, fp32, in nats; ``kwargs`` are for the decoder.

        Both tensors are int64 ``[B, T]``: ``targets`` has the token behind each, or ``IGNORED``.
        """
        # Not by `decode`, behind which FSDP2 would take the head's weights away again.
        hidden = self.model.get_decoder()(tokens, use_cache=False, **kwargs).last_hidden_state.flatten(0, 1)
        slices = zip(hidden.split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS), strict=True)
        if not hidden.requires_grad:
            return torch.stack([self._loss(*part) for part in slices]).sum()
        losses = [checkpoint(self._loss, *part, use_reentrant=False) for part in slices]
        return torch.stack(losses).sum()

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits_of(self.model, hidden).float(), targets, reduction="sum", ignore_index=IGNORED
        )
