"""Perplexity by position, and needles by the next token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from seerattention.evals import tasks
from seerattention.evals.tasks import Source
from seerattention.measure import bundled


def test_windows_take_turns_between_documents_and_never_overlap(byte_source) -> None:
    # Of 10, 35 and 22 tokens: windows of 9 tokens and BOS.
    parts = np.split(byte_source.haystack[:67], [10, 45])
    source = Source(byte_source.tokenizer, parts)
    task = tasks.create("perplexity", parts=2)
    windows = [task.make(source, 10, seed).prompt for seed in range(6)]
    expected = [parts[0][:9], parts[1][:9], parts[2][:9], parts[1][9:18], parts[2][9:18], parts[1][18:27]]
    for window, part in zip(windows, expected, strict=True):
        assert window.tolist() == [byte_source.tokenizer.bos_token_id, *part.tolist()]
    with pytest.raises(ValueError, match="the text has 6 windows of 10 tokens, window 7 was asked for"):
        task.make(source, 10, 6)
    with pytest.raises(ValueError, match="perplexity needs more than 2 tokens, got 3"):
        task.make(source, 3, 0)


@pytest.fixture(scope="module")
def teacher():
    return bundled.load_teacher()[0]


def test_losses_by_position_are_those_of_the_whole_logits(teacher, teacher_source) -> None:
    task = tasks.create("perplexity", parts=3)
    sample = task.make(teacher_source, 200, 1)
    outcome = task.run(teacher, teacher_source, sample)
    ids = torch.from_numpy(sample.prompt)[None]
    with torch.inference_mode():
        logits = teacher(ids).logits[0, :-1].double()
    losses = -logits.log_softmax(-1)[torch.arange(199), ids[0, 1:]]
    assert outcome.score == pytest.approx(float(losses.mean()))
    assert [(first, end) for first, end, _ in outcome.by_position] == [(1, 67), (67, 133), (133, 200)]
    for first, end, loss in outcome.by_position:
        assert loss == pytest.approx(float(losses[first - 1 : end - 1].mean()))
    assert math.exp(outcome.score) < 200


def test_needles_are_asked_as_in_the_demo(teacher, teacher_source) -> None:
    task = tasks.create("needle", needles=3)
    sample = task.make(teacher_source, 512, 7)
    document = sample.document
    for value, (start, stop), place in zip(document.values, document.places, sample.places, strict=True):
        assert start == place
        statement = teacher_source.tokenizer.decode(sample.prompt[start:stop].tolist())
        assert statement.startswith("\nThe number of the")
        assert statement.endswith(f" is {value}.\n")
    outcome = task.run(teacher, teacher_source, sample)
    # The model learned this; what it said and the score agree.
    assert outcome.answer.split() == list(sample.expected)
    assert outcome.score == 1
    with torch.no_grad():
        copy = {k: v.clone() for k, v in teacher.state_dict().items()}
        teacher.model.norm.weight.neg_()
        worse = task.run(teacher, teacher_source, sample)
        teacher.load_state_dict(copy)
    assert worse.score == 0


def test_generation_is_the_models_own_greedy(teacher, teacher_source) -> None:
    task = tasks.create("variable_tracking")
    sample = task.make(teacher_source, 900, 0)
    outcome = task.run(teacher, teacher_source, sample)
    ids = torch.from_numpy(sample.prompt)[None]
    out = teacher.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(ids))
    assert outcome.answer == teacher_source.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert 0 < outcome.prefill_s < outcome.seconds
    # It stops before the model's end token, which here is what it says third.
    said = out[0, ids.shape[1] :].tolist()
    assert said[2] not in said[:2]
    before, teacher.generation_config.eos_token_id = teacher.generation_config.eos_token_id, said[2]
    shorter = task.run(teacher, teacher_source, sample)
    teacher.generation_config.eos_token_id = before
    assert shorter.answer == teacher_source.tokenizer.decode(said[:2])
