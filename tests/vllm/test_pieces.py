"""Prompts that a scheduler gives in pieces."""

import pytest
from transformers import DynamicCache

from seerattention.engine.requests import parts
from seerattention.hosts.vllm.summaries import Stale
from tests.vllm.engines import Alone, answers, assert_as_alone, differing, engine, settings, texts, watched

LAST_ROWS = "top_k:0.2,dense_last_rows=2"


@pytest.mark.parametrize("batch", [300, 128])
@pytest.mark.parametrize("summaries", ["made", "kept"])
@pytest.mark.parametrize(
    "policy", ["top_k:0.3", "token_budget:384,sink_blocks=1", "top_k:0.2,dense_last_rows=2"]
)
def test_aligned_pieces_choose_as_the_whole(batch, summaries, policy):
    given = settings(policy, summaries=summaries, aligned=True)
    with engine(given, max_num_batched_tokens=batch) as llm:
        assert_as_alone(llm, texts(1500, 777, 130, 65, begin=20000), policy)


@pytest.mark.parametrize("summaries", ["made", "kept"])
def test_a_piece_may_end_inside_a_block(summaries):
    """Then the block's first part chooses by the tokens that it has, and the rest is dense."""
    (prompt,) = texts(1477, begin=20000)
    cuts = [part for past in range(0, 1477, 300) for part in parts(past, min(300, 1477 - past), 1477, 64)]
    assert (300, 320) in cuts
    alone = Alone()
    expected = alone.goes_on(DynamicCache(), prompt, cuts)
    with engine(settings(summaries=summaries), max_num_batched_tokens=300) as llm:
        seen = watched(llm)
        assert answers(llm, [prompt]) == [expected]
    assert seen == alone.seen


def test_old_summaries_are_noticed(monkeypatch):
    monkeypatch.setattr(Stale, "after", lambda *given: {row: [] for row in given[-1]})
    first, more = texts(700, 500, begin=40000)
    with engine(settings(summaries="kept")) as llm:
        (said,) = answers(llm, [first], 400)
        kept = watched(llm)
        answers(llm, [first + said + more], 1)
    with engine(settings(summaries="made")) as llm:
        answers(llm, [first], 400)
        made = watched(llm)
        answers(llm, [first + said + more], 1)
    assert set(kept) == set(made)
    assert kept != made


def test_a_short_last_piece_chooses():
    (prompt,) = texts(1024 + 9, begin=20000)
    with engine(settings(aligned=True), max_num_batched_tokens=512) as llm:
        assert differing(llm, [prompt]) == 0


@pytest.mark.parametrize("batch", [32, 63, 70])
def test_batches_smaller_than_a_block_end(batch):
    """Nothing waits for a block that is never left beside what is decoded."""
    prompts = texts(300, 200, 150, 9, begin=20000)
    with engine(settings(aligned=True), max_num_batched_tokens=batch, max_num_seqs=8) as llm:
        assert [len(out) for out in answers(llm, prompts, 30)] == [30] * 4
