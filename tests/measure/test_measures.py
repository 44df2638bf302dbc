"""Perplexity and retrieval on a stand-in for a language model, what a watch sees, and timing."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seerattention import BlockSelection, causal_blocks
from seerattention.hosts.transformers import AttentionCall
from seerattention.measure import perplexity as perplexity_module
from seerattention.measure.needle import NeedleDocument
from seerattention.measure.observe import Watch
from seerattention.measure.perplexity import next_token_losses, perplexity
from seerattention.measure.retrieval import retrieval
from seerattention.measure.timing import interleaved
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing.conformance import dense_weights
from seerattention.testing.inputs import random_qkv, random_selection

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


def call_of(shape: Shape) -> AttentionCall:
    q, k, v = random_qkv(shape)
    positions = torch.arange(shape.keys - shape.queries, shape.keys)
    return AttentionCall(0, q, k, v, q, k[:, :, -shape.queries :], positions, 0.5)


@pytest.mark.parametrize("queries", [300, 100])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_watch_sees_density_and_recall(queries: int, heads: int) -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=queries, keys=300, head_dim=16, batch=2)
    call = call_of(shape)
    selection = random_selection(shape, density=0.3, heads=heads)
    watch = Watch(rows=queries)
    watch(0, call, selection)
    valid = causal_blocks(queries, 300, (64, 64))
    assert watch.density == pytest.approx(selection.density(valid))
    share = dense_weights(call.q, call.k, scale=0.5)
    read = selection.to_mask().repeat_interleave(4 // heads, 1)
    read = read.repeat_interleave(64, 2)[:, :, :queries].repeat_interleave(64, 3)[..., :300]
    recall = float((share * read).sum(-1).mean())
    assert watch.recall == pytest.approx(recall)
    assert 0.1 < recall < 0.99
    full = BlockSelection.full(Rows.last(queries, 300), (64, 64))
    watch(1, call, BlockSelection.from_mask(full.to_mask().expand(2, 4, -1, -1), (64, 64)))
    assert watch.recall == pytest.approx((recall + 1) / 2)


def test_watch_without_rows_and_without_calls() -> None:
    watch = Watch()
    assert (watch.density, watch.recall) == (1, 1)
    shape = Shape(name="", heads=4, kv_heads=2, queries=300, keys=300, head_dim=16)
    watch(0, call_of(shape), random_selection(shape, density=0.0))
    assert watch.density == 5 / 15
    assert watch.recall == 1


def test_timing_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(float(x * x) for x in range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    seconds = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=3,
        warmup=1,
        after=calls.append,
    )
    assert "".join(calls) == "aabb" * 4
    # Between readings n and n + 1 lie 2n + 1 seconds. Every call reads twice: timed calls of a start at
    # readings 4, 8, 12 and those of b at 6, 10, 14.
    assert seconds == {"a": [2 * n + 1 for n in (4, 8, 12)], "b": [2 * n + 1 for n in (6, 10, 14)]}
