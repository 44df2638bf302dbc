"""Prompts that come whole choose what they would in the attached model, whatever pages hold them."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from seerattention.hosts.vllm.served import Served
from tests.vllm.engines import (
    LENGTHS,
    Alone,
    answers,
    assert_as_alone,
    differing,
    engine,
    served_by,
    settings,
    texts,
    watched,
)

PAGE = 128


@pytest.fixture(scope="module", params=["made", "kept"])
def llm(request):
    with engine(settings(summaries=request.param), max_num_batched_tokens=8192, block_size=PAGE) as made:
        yield made


@pytest.fixture(autouse=True)
def _forget(llm):
    """No test finds the pages of another."""
    llm.reset_prefix_cache()


@pytest.mark.parametrize("length", LENGTHS)
def test_one(llm, length):
    assert_as_alone(llm, texts(length, begin=7000))


def test_three_at_once(llm):
    assert_as_alone(llm, texts(1500, 777, 130, begin=20000))


def test_sparse_is_not_dense(llm):
    prompts = texts(1500, 777, begin=20000)
    assert answers(llm, prompts) != Alone(None).answers(prompts)[0]


def test_a_prefix_that_another_prompt_left(llm):
    """Of as many tokens, so that the first prompt's rows have read what the second's would."""
    first, other = texts(1500, 400, begin=30000)
    second = first[:1100] + other
    answers(llm, [first])
    (expected,), rows = Alone().answers([second])
    seen = watched(llm)
    assert answers(llm, [second]) == [expected]
    cached = 1100 // PAGE * PAGE
    assert seen == {key: row for key, row in rows.items() if key[2] >= cached}


@pytest.mark.parametrize("decoded", [150, 400])
def test_a_second_turn(llm, decoded):
    """Pages of tokens that were decoded hold keys, and summaries of nothing."""
    first, more = texts(700, 500, begin=40000)
    alone, cache = Alone(), DynamicCache()
    (said,) = answers(llm, [first], decoded)
    out = alone.model.generate(
        torch.tensor([first]),
        past_key_values=cache,
        max_new_tokens=decoded,
        do_sample=False,
        eos_token_id=None,
    )
    assert out[0, len(first) :].tolist() == said
    second = first + said + more
    cached = (len(first) + decoded - 1) // PAGE * PAGE
    assert cached > len(first)
    cache.crop(cached)
    alone.seen.clear()
    expected = alone.goes_on(cache, second, [(cached, len(second))])
    seen = watched(llm)
    assert answers(llm, [second]) == [expected]
    assert seen == alone.seen
    assert min(position for _, _, position in seen) == cached


def test_pages_of_another_request(llm):
    """A page that is used anew holds summaries behind a prompt's last token, which nobody is to read."""
    answers(llm, texts(2000, begin=2000))
    llm.reset_prefix_cache()
    for length in (200, 70, 5):
        assert_as_alone(llm, texts(length, begin=6000))
        llm.reset_prefix_cache()


def test_swapped_pages_are_noticed(llm, monkeypatch):
    look = Served.look

    def swapped(self, given):
        batch = look(self, given)
        return replace(batch, table=torch.cat((batch.table[:, :2].flip(1), batch.table[:, 2:]), 1))

    monkeypatch.setattr(Served, "look", swapped)
    assert differing(llm, texts(777, begin=15000))


def test_a_position_too_far_is_noticed(llm, monkeypatch):
    unrotate = type(served_by(llm).layer.unrotate)
    angles = unrotate.angles
    monkeypatch.setattr(unrotate, "angles", lambda self, layer, at: angles(self, layer, at + 1))
    assert differing(llm, texts(777, begin=15000))
