"""Which blocks single tokens read: by hand, as in prefill, and the same from every backend."""

from __future__ import annotations

import pytest
import torch

from seerattention.baselines import create
from seerattention.gate import AttnGate, GateConfig
from seerattention.ops.cases.select_decode_blocks import CASES
from seerattention.ops.select_blocks import select_blocks
from seerattention.ops.select_decode_blocks import composed, select_decode_blocks
from seerattention.ops.select_decode_blocks.reference import chosen, group_scores
from seerattention.policies import Threshold, TokenBudget, TopK, TopP
from seerattention.rows import Rows
from seerattention.testing.selections import Certain, decode_arguments

BLOCK = 16
POLICIES = [
    TokenBudget(48),
    TokenBudget(64, sink_blocks=1, local_blocks=2),
    Threshold(0.1),
    TopP(0.7, sink_blocks=1),
]
DESIGNS = [
    {},
    {"per_kv_head": True, "q_sub_block": 1, "k_sub_block": None},
    {"per_kv_head": True, "q_sub_block": 1, "k_sub_block": 8, "qk_norm": True, "q_pool": ("avg",)},
]


def gate_of(**design):
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "block_size": BLOCK}
    gate = AttnGate(GateConfig(**sizes, **design)).requires_grad_(False)
    gate.linear_q.weight.mul_(8)
    return gate


def inputs(gate, batch, tokens, keys):
    torch.manual_seed(1)
    q, k = torch.randn(batch, 4, tokens, 16), torch.randn(batch, 2, keys, 16)
    return q, gate.compress(k, positions=torch.arange(keys))


def lengths_of(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def test_a_row_made_by_hand():
    scores = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0]).expand(1, 1, 3, 5)
    # Blocks of 4: the queries at 13, 14 and 15, of which only the last one's block is finished.
    at = torch.tensor([[13, 14, 15]])
    read = chosen(TokenBudget(8), scores, at, 4, 1)[0, 0]
    assert read.tolist() == [[True, False, False, True, False]] * 3
    share = chosen(Threshold(0.5), scores, at, 4, 1)[0, 0]
    # The last block takes all of the softmax once it is finished, and nothing before.
    assert share.tolist() == [[True, False, False, True, False]] * 2 + [[False, False, False, True, False]]


def test_the_heads_of_a_group_are_merged_by_their_largest_share():
    scores = torch.tensor([[[[5.0, 5.0, 9.0]], [[0.0, 2.0, 9.0]], [[1.0, 1.0, 9.0]], [[1.0, 1.0, 9.0]]]])
    finished = torch.tensor([True, True, False])
    shares = group_scores(scores, finished, 2).exp()
    high = torch.sigmoid(torch.tensor(2.0))
    torch.testing.assert_close(shares[0, 0, 0], torch.tensor([0.5, high, 0.0]))
    torch.testing.assert_close(shares[0, 1, 0], torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("design", DESIGNS, ids=["default", "decode", "normed"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_backends_agree_on_sequences_of_all_lengths(policy, design, tokens):
    gate = gate_of(**design)
    q, k_blocks = inputs(gate, 7, tokens, 128)
    lengths = lengths_of(tokens, 15, 16, 17, 64, 127, 128)
    more = {"lengths": lengths, "num_keys": 128, "kv_heads": 2}
    found = select_decode_blocks(q, k_blocks, gate.per_token(), policy, **more, backend="composed")
    expected = select_decode_blocks(q, k_blocks, gate.per_token(), policy, **more, backend="reference")
    assert found.shape == expected.shape == (7, 2, tokens, 8)
    assert torch.equal(found.bits, expected.bits)


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_what_is_not_finished_has_no_influence(backend):
    gate = gate_of(**DESIGNS[1])
    q, k_blocks = inputs(gate, 3, 2, 128)
    lengths = lengths_of(2, 40, 64)
    more = {"lengths": lengths, "num_keys": 128, "kv_heads": 2, "backend": backend}
    clean = select_decode_blocks(q, k_blocks, gate.per_token(), TokenBudget(48), **more)
    for row, length in enumerate(lengths.tolist()):
        k_blocks[row, :, length // BLOCK :] = torch.nan
    poisoned = select_decode_blocks(q, k_blocks, gate.per_token(), TokenBudget(48), **more)
    assert torch.equal(clean.bits, poisoned.bits)


def test_a_token_that_finishes_a_block_reads_what_prefill_reads():
    gate = gate_of(per_kv_head=True, q_sub_block=1, k_sub_block=None)
    q, k_blocks = inputs(gate, 1, 1, 128)
    scorer = gate.per_token()
    more = {"lengths": lengths_of(128), "num_keys": 128, "kv_heads": 2}
    for policy in POLICIES:
        step = select_decode_blocks(q, k_blocks, scorer, policy, **more)
        row = select_blocks(q, k_blocks, scorer, policy, rows=Rows.last(1, 128))
        assert torch.equal(step.bits, row.bits)


@pytest.mark.parametrize("name", ["quest", "meanpool"])
def test_rules_that_are_products_of_a_token_agree_with_their_scores(name):
    scorer = create(name, block_size=(BLOCK, BLOCK)).per_token()
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 96, 16)
    k_blocks = scorer.compress(k, positions=torch.arange(96))
    valid = Rows.last(1, 96).causal(scorer.block_size)
    scores = scorer.score(q, k_blocks, positions=torch.tensor([95]), valid=valid)
    products = scorer.summarise_queries(q, positions=torch.tensor([95])).unflatten(1, (2, 2))
    torch.testing.assert_close(scores.unflatten(1, (2, 2)), products @ k_blocks[:, :, None].mT * scorer.scale)
    more = {"lengths": lengths_of(96, 50), "num_keys": 96, "kv_heads": 2}
    found = select_decode_blocks(q, k_blocks, scorer, TokenBudget(48), **more, backend="composed")
    expected = select_decode_blocks(q, k_blocks, scorer, TokenBudget(48), **more, backend="reference")
    assert torch.equal(found.bits, expected.bits)


@pytest.mark.parametrize("name", ["oracle", "oracle_mass", "random", "streaming"])
def test_other_scorers_take_the_reference(name):
    scorer = create(name, block_size=(BLOCK, BLOCK)).per_token()
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 96, 16)
    k_blocks = scorer.compress(k, positions=torch.arange(96))
    policy = TokenBudget(48)
    found = select_decode_blocks(
        q, k_blocks, scorer, policy, lengths=lengths_of(96, 50), num_keys=96, kv_heads=2
    )
    assert found.shape == (2, 2, 3, 6)
    assert (found.counts == 3).all()


@pytest.mark.parametrize(
    ("changes", "policy", "message"),
    [
        ({}, TopK(0.1), "top_k:0.1 is a share of a whole prompt"),
        ({}, TokenBudget(64, dense_last_rows=2), "dense_last_rows are a prompt's"),
        ({}, TokenBudget(15), "is less than a block of 16 tokens"),
        ({"num_keys": 256}, TokenBudget(48), r"k_blocks must be \[1, H, 16, E\]"),
        ({"lengths": lengths_of(64, 64)}, TokenBudget(48), r"lengths must be \[1\]"),
        ({"kv_heads": 3}, TokenBudget(48), "multiple of KV heads"),
    ],
)
def test_refusals(changes, policy, message):
    gate = gate_of(**DESIGNS[1])
    q, k_blocks = inputs(gate, 1, 1, 128)
    more = {"lengths": lengths_of(128), "num_keys": 128, "kv_heads": 2} | changes
    with pytest.raises(ValueError, match=message):
        select_decode_blocks(q, k_blocks, gate.per_token(), policy, **more)


def test_a_scorer_of_query_blocks_is_refused():
    gate = gate_of()
    q, k_blocks = inputs(gate, 1, 1, 128)
    more = {"lengths": lengths_of(128), "num_keys": 128, "kv_heads": 2}
    with pytest.raises(ValueError, match=r"use scorer.per_token\(\)"):
        select_decode_blocks(q, k_blocks, gate, TokenBudget(48), **more)


def ahead_of_its_block(lengths, k_blocks, **call):
    """The block in the making takes part as if it were finished."""
    return composed.run(lengths=(lengths + BLOCK - 1) // BLOCK * BLOCK, k_blocks=k_blocks, **call)


def behind_by_a_block(lengths, k_blocks, **call):
    """The block that a token finishes has no summary yet."""
    return composed.run(lengths=lengths - (lengths % BLOCK == 0).int(), k_blocks=k_blocks, **call)


def split_lost(k_blocks, **call):
    """The second half of the cache is not scored."""
    half = k_blocks.clone()
    half[:, :, k_blocks.shape[2] // 2 :] = 0
    return composed.run(k_blocks=half, **call)


@pytest.mark.parametrize(
    ("bug", "name"),
    [
        (ahead_of_its_block, "ragged"),
        (behind_by_a_block, "finishes-a-block"),
        (split_lost, "several-tiles"),
    ],
)
def test_planted_bugs_are_noticed(bug, name):
    args = decode_arguments(next(case for case in CASES if case.name == name))
    for policy in (Threshold(0.02), TokenBudget(160)):
        certain = Certain.of_tokens(policy=policy, **args)
        certain.check(composed.run(policy=policy, **args))
    args["k_blocks"] = args["k_blocks"].nan_to_num(0)
    with pytest.raises(AssertionError):
        certain.check(bug(policy=policy, **args))
