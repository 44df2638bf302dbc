"""Dense beside sparse: what a row says, and that the model is left as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from seerattention import attach, detach
from seerattention.hosts.transformers import attached as is_attached
from seerattention.hosts.transformers import new_gates
from seerattention.measure import bundled, compare
from seerattention.measure.compare import distinct, measured
from seerattention.measure.needle import NeedleTask, wordings
from seerattention.measure.observe import Watch
from seerattention.measure.perplexity import next_token_losses, perplexity
from seerattention.measure.retrieval import retrieval, understood

POLICY = "top_k:0.3,sink_blocks=1"


@pytest.fixture(scope="module")
def given():
    model, tokenizer = bundled.load_teacher()
    text = bundled.text_tokens(tokenizer)[1]
    windows = [text[:640], text[640:1280]]
    documents = [NeedleTask(tokenizer, text, num_needles=2).make(640, seed) for seed in range(2)]
    return model, bundled.load_teacher_gates(), windows, documents


def test_a_row_is_what_its_parts_are_alone(given) -> None:
    model, gates, windows, documents = given
    row = measured(model, gates, POLICY, method="gates", windows=windows, documents=documents, recall_rows=4)
    assert not is_attached(model)
    watch = Watch(4)
    attach(model, gates, POLICY, min_tokens=0, observe=watch)
    try:
        assert row.perplexity == pytest.approx(
            perplexity(model, np.concatenate(windows), window=640, windows=2)
        )
        assert row.needles == retrieval(model, documents)
        for losses, window in zip(row.losses, windows, strict=True):
            torch.testing.assert_close(torch.from_numpy(losses).float(), next_token_losses(model, window))
    finally:
        detach(model)
    assert (row.method, row.policy, row.tokens) == ("gates", POLICY, 640)
    assert 0.2 < row.density < 0.6
    assert row.recall is not None
    assert 0.3 < row.recall < 1
    assert row.prefill_s is not None
    assert row.prefill_s > 0
    assert set(row.values()) == {
        "method", "policy", "tokens", "density", "perplexity", "needles", "recall", "prefill_s"
    }  # fmt: skip


def test_dense_is_a_row_like_any_other(given) -> None:
    model, gates, windows, _ = given
    dense = measured(model, None, windows=windows[:1])
    assert (dense.method, dense.policy, dense.density) == ("dense", "", 1)
    assert (dense.needles, dense.recall) == (None, None)
    assert dense.perplexity == pytest.approx(math.exp(float(next_token_losses(model, windows[0]).mean())))
    everything = measured(model, gates, "top_k:1", windows=windows[:1])
    assert (everything.method, everything.density) == ("sparse", 1)
    assert everything.perplexity == pytest.approx(dense.perplexity, rel=1e-5)


def test_a_text_too_short_for_the_density_asked_for_is_said(given) -> None:
    model, gates, windows, _ = given
    # Ten blocks: the first and the own one are more than the one that 10 % come to.
    short = measured(model, gates, "top_k:0.1,sink_blocks=1", windows=windows[:1])
    assert short.short is not None
    assert "asks for 10.0% of a prompt of 10 blocks and reads" in short.short
    assert f"reads {short.density:.1%}" in short.short
    assert measured(model, gates, "top_k:1", windows=windows[:1]).short is None


@pytest.mark.parametrize(
    ("tokens", "densities"),
    [
        (65536, [0.2, 0.1, 0.05]),
        # 32 blocks: 5 and 10 % are the first block and the own one, 11.9 %; 64 blocks: 5 % is.
        (2048, [0.2, 0.1]),
        (4096, [0.2, 0.1, 0.05]),
        # 4 blocks: all are two blocks, 70 %.
        (256, [0.2]),
    ],
)
def test_densities_that_read_the_same_are_one(tokens: int, densities: list[float]) -> None:
    found = distinct((0.2, 0.1, 0.05), tokens, 64)
    assert [policy.density for policy in found] == densities
    assert all(policy.sink_blocks == 1 for policy in found)


def test_every_text_is_a_step(given) -> None:
    model, gates, windows, documents = given
    steps: list[int] = []
    measured(model, gates, POLICY, windows=windows, documents=documents, step=lambda: steps.append(1))
    assert len(steps) == len(windows) + len(documents)


def test_the_policy_saved_with_the_gates_is_the_default(given) -> None:
    model, _, windows, _ = given
    torch.manual_seed(0)
    gates = new_gates(model)
    gates.policy = "top_k:0.5"
    assert measured(model, gates, windows=windows[:1]).policy == "top_k:0.5"


def test_the_model_is_left_as_it_was_when_measuring_fails(given, monkeypatch) -> None:
    model, gates, windows, documents = given

    def fail(*args: object) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(compare, "retrieval", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measured(model, gates, POLICY, windows=windows[:1], documents=documents)
    assert not is_attached(model)
    with pytest.raises(ValueError, match="there is nothing to measure on"):
        measured(model, gates, POLICY)
    assert not is_attached(model)


def test_the_bundled_teacher_is_asked_in_its_own_words() -> None:
    model, tokenizer = bundled.load_teacher()
    text = bundled.text_tokens(tokenizer)[1]
    asked = {w.name: [NeedleTask(tokenizer, text, wording=w).make(1024, 0)] for w in wordings(tokenizer)}
    assert list(asked) == ["the bundled teacher's words", "RULER's words"]
    assert understood(model, asked) == ("the bundled teacher's words", 1)
    np.testing.assert_array_equal(
        asked["the bundled teacher's words"][0].tokens, NeedleTask(tokenizer, text).make(1024, 0).tokens
    )
