"""Policies that take a fixed number of blocks know their density before any scores are there."""

import pytest
import torch

from seerattention.policies import parse, select
from seerattention.rows import Rows
from seerattention.selection import causal_blocks


@pytest.mark.parametrize(
    "text",
    [
        "top_k:0.1",
        "top_k:0.3,sink_blocks=1",
        "top_k:1.0",
        "top_k:0.1,dense_last_rows=2,local_blocks=3",
        "token_budget:128",
        "token_budget:64,sink_blocks=2,dense_last_rows=90",
    ],
)
@pytest.mark.parametrize("blocks", [1, 2, 60])
def test_it_bounds_the_density_and_meets_it(text, blocks):
    policy = parse(text)
    tokens, size = 16 * blocks, (16, 16)
    expected = policy.expected_density(blocks, 16)
    # What is always read is best avoided by the scores: then everything comes on top.
    distance = torch.arange(blocks)[:, None] - torch.arange(blocks)
    far = (distance >= policy.local_blocks) & (torch.arange(blocks) >= policy.sink_blocks)
    scores = (torch.rand(1, 1, blocks, blocks) + 10 * far).masked_fill(distance < 0, float("-inf"))
    sizes = {"rows": Rows.last(tokens, tokens), "block_size": size}
    valid = causal_blocks(tokens, tokens, size)
    assert select(policy, scores, **sizes).density(valid) == pytest.approx(expected)
    assert select(policy, torch.rand_like(scores), **sizes).density(valid) <= expected + 1e-9


def test_others_know_nothing_ahead():
    assert parse("threshold:0.1").expected_density(100, 64) is None
    assert parse("top_p:0.9").expected_density(100, 64) is None
