"""Policies that take a number of blocks know their density before any scores are there."""

import re

import pytest
import torch

from seerattention.policies import Calibrated, Calibration, Threshold, TokenBudget, TopK, parse, select
from seerattention.rows import Rows
from seerattention.selection import causal_blocks


@pytest.mark.parametrize(
    "text",
    [
        "top_k:0.1",
        "top_k:0.3,sink_blocks=1",
        "top_k:1.0",
        "top_k:0.1,dense_last_rows=2,local_blocks=3",
        "top_k:0.05,sink_blocks=3,local_blocks=4",
        "token_budget:128",
        "token_budget:32,local_blocks=99",
        "token_budget:64,sink_blocks=2,dense_last_rows=90",
    ],
)
@pytest.mark.parametrize("blocks", [1, 2, 5, 60])
def test_it_is_the_density_whatever_the_scores(text, blocks):
    policy = parse(text)
    tokens, size = 16 * blocks, (16, 16)
    valid = causal_blocks(tokens, tokens, size)
    expected = policy.expected_density(blocks, 16)
    distance = torch.arange(blocks)[:, None] - torch.arange(blocks)
    # Scores of any kind, those that avoid or prefer what is always read among them.
    for scores in (torch.rand(blocks, blocks), 1.0 * distance, -1.0 * distance, torch.zeros(blocks, blocks)):
        found = select(policy, scores[None, None], rows=Rows.last(tokens, tokens), block_size=size)
        assert found.density(valid) == pytest.approx(expected, rel=1e-12)


def test_others_know_nothing_ahead():
    assert parse("threshold:0.1").expected_density(100, 64) is None
    assert parse("top_p:0.9").expected_density(100, 64) is None


def test_a_prompt_too_short_for_the_density_asked_for():
    assert TopK(0.1).rule(32, 64) == TopK(0.05).rule(32, 64), "the same one block at 2,048 tokens"
    assert TopK(0.1).short_of(32, 64) == (
        "top_k:0.1 asks for 10.0% of a prompt of 32 blocks and reads 6.1%: a row reads whole blocks, "
        "at least 1"
    )
    assert TopK(0.05, sink_blocks=1).short_of(32, 64) == (
        "top_k:0.05,sink_blocks=1 asks for 5.0% of a prompt of 32 blocks and reads 11.9%: a row reads whole "
        "blocks, at least 2"
    )
    assert str(TopK(0.1, dense_last_rows=2).short_of(64, 64)).endswith("at least 1, and the last 2 read all")


def test_a_long_enough_prompt_is_not_short():
    assert TopK(0.1).short_of(512, 64) is None
    assert TopK(0.1, sink_blocks=1, dense_last_rows=2).short_of(512, 64) is None
    assert TopK(1.0).short_of(1, 64) is None
    assert TokenBudget(4096).short_of(512, 64) is None
    assert TokenBudget(4096).short_of(2, 64) is None, "fewer tokens than the budget are all read"
    assert Threshold(0.1).short_of(2, 64) is None


@pytest.mark.parametrize(
    ("policy", "reads"), [(TokenBudget(32), r"1\.5%.* 3\.1%"), (TokenBudget(127), r"6\.1%.* 3\.1%")], ids=str
)
def test_a_budget_of_less_than_whole_blocks(policy, reads):
    assert re.search(reads, str(policy.short_of(64, 64)))


def test_calibrated_thresholds_cannot_read_less_than_is_always_read():
    made = Calibration("density", 0.02, 1024, (64, 64), 0.0, 0.02, {0: ((-1.0, 0.0, 0.0),)})
    policy = Calibrated(made, sink_blocks=1)
    assert "2.0% of a prompt of 32 blocks and reads 11.9%" in str(policy.short_of(32, 64))
    assert policy.short_of(512, 64) is None
