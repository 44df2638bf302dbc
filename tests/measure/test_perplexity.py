"""Perplexity and retrieval on a stand-in for a language model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seerattention.measure import perplexity as perplexity_module
from seerattention.measure.needle import NeedleDocument
from seerattention.measure.perplexity import next_token_losses, perplexity
from seerattention.measure.retrieval import retrieval, understood

VOCABULARY = 20


class Bigram(nn.Module):
    """Predicts from the last token alone, through the interface of a transformers model."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=SimpleNamespace)

    def __init__(self, certain: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, VOCABULARY)
        self.head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        if certain:
            # The most likely next token is always the next number.
            self.embedding.weight.data = torch.eye(VOCABULARY)
            self.head.weight.data = torch.eye(VOCABULARY).roll(1, 0)

    def get_decoder(self) -> Any:
        def decode(ids: Tensor, use_cache: bool) -> SimpleNamespace:
            assert not use_cache
            return SimpleNamespace(last_hidden_state=self.embedding(ids))

        return decode

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def model(certain: bool = False) -> Any:
    return Bigram(certain)


def test_losses_are_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    bigram, tokens = model(), np.arange(50) * 7 % VOCABULARY
    logits = bigram.head(bigram.embedding.weight).detach()
    expected = -logits.log_softmax(-1)[tokens[:-1], tokens[1:]]
    for rows in (2048, 49, 7, 1):
        monkeypatch.setattr(perplexity_module, "LOGIT_ROWS", rows)
        torch.testing.assert_close(next_token_losses(bigram, tokens), expected)


def test_perplexity_of_windows() -> None:
    bigram, tokens = model(), np.arange(100) * 7 % VOCABULARY
    losses = torch.cat([next_token_losses(bigram, tokens[i : i + 30]) for i in (0, 30, 60)])
    assert len(losses) == 3 * 29
    assert perplexity(bigram, tokens, window=30, windows=3) == pytest.approx(math.exp(float(losses.mean())))


def test_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="perplexity needs at least two tokens, got 1"):
        next_token_losses(model(), np.arange(1))
    with pytest.raises(ValueError, match="4 windows of 30 tokens need 120, got 100"):
        perplexity(model(), np.arange(100), window=30, windows=4)


def test_retrieval_counts_answers_over_all_documents() -> None:
    right = NeedleDocument(np.array([0, 1, 2, 3, 4, 5]), ((1, 3), (4, 6)), ("a", "b"), ("12", "45"))
    half = NeedleDocument(np.array([0, 1, 2, 3, 4, 9]), ((1, 3), (4, 6)), ("a", "b"), ("12", "49"))
    assert retrieval(model(certain=True), [right]) == 1
    assert retrieval(model(certain=True), [right, half]) == 0.75


def test_the_wording_that_a_model_answers_best_is_the_one_it_understands() -> None:
    right = NeedleDocument(np.array([0, 1, 2, 3, 4, 5]), ((1, 3), (4, 6)), ("a", "b"), ("12", "45"))
    half = NeedleDocument(np.array([0, 1, 2, 3, 4, 9]), ((1, 3), (4, 6)), ("a", "b"), ("12", "49"))
    steps: list[int] = []
    asked = {"some": [right, half], "all": [right, right], "all again": [right, right]}
    assert understood(model(certain=True), asked, lambda: steps.append(1)) == ("all", 1)
    assert len(steps) == 6
    assert understood(model(certain=True), {"some": [right, half]}) == ("some", 0.75)
