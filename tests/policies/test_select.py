from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seerattention import causal_blocks
from seerattention.policies import (
    Policy,
    Rule,
    Threshold,
    TokenBudget,
    TopK,
    TopP,
    parse,
    policies,
    rule_of,
    select,
)
from seerattention.rows import Rows

POLICIES = [Threshold(0.2), Threshold(0.99), TopK(0.1), TopP(0.5), TokenBudget(64), TokenBudget(10**6)]


def chosen(policy: Policy, scores: Tensor, queries: int, keys: int, block: tuple[int, int]) -> Tensor:
    return select(policy, scores, rows=Rows.last(queries, keys), block_size=block).to_mask()


def random_scores(queries: int, keys: int, block: tuple[int, int], seed: int = 0) -> Tensor:
    shape = causal_blocks(queries, keys, block).shape
    return 3 * torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.sampled_from(POLICIES),
    st.integers(1, 300),
    st.integers(0, 300),
    st.sampled_from([(16, 16), (32, 16), (16, 32), (1, 16)]),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_own_blocks_always_and_later_ones_never(
    policy: Policy,
    queries: int,
    past: int,
    block: tuple[int, int],
    sink: int,
    local: int,
    dense: int,
    seed: int,
) -> None:
    keys = queries + past
    policy = replace(policy, sink_blocks=sink, local_blocks=local, dense_last_rows=dense)
    mask = chosen(policy, random_scores(queries, keys, block, seed), queries, keys, block)
    valid, own = causal_blocks(queries, keys, block), Rows.last(queries, keys).own(block)
    assert not (mask & ~valid).any()
    assert (mask | ~own).all()
    assert mask.any(-1).all()
    assert torch.equal(mask[..., :sink], valid[:, :sink].expand_as(mask[..., :sink]))
    for i in range(valid.shape[0]):
        first = int(own[i].nonzero()[0])
        near = valid[i].clone()
        near[: max(0, first - local + 1)] = False
        assert (mask[:, :, i] | ~near).all()
        if i >= valid.shape[0] - dense:
            assert (mask[:, :, i] == valid[i]).all()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_useless_scores_leave_no_row_empty(policy: Policy, value: float) -> None:
    scores = torch.full((1, 1, 5, 5), value)
    mask = chosen(policy, scores, 300, 300, (64, 64))
    assert mask.diagonal(dim1=2, dim2=3).all()
    assert not mask.triu(1).any()


@dataclass(frozen=True)
class Acausal(Policy):
    """Takes every block there is, the future included."""

    name: ClassVar[str] = "acausal"
    value: float

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)


@dataclass(frozen=True)
class Lazy(Policy):
    """Takes nothing."""

    name: ClassVar[str] = "lazy"
    value: float

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        return torch.zeros_like(scores, dtype=torch.bool)


def test_a_new_policy_is_one_class_and_cannot_break_the_guarantees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("seerattention.policies.Acausal", Acausal, raising=False)
    assert policies()["acausal"] is Acausal
    policy = parse("acausal:1,sink_blocks=1")
    assert policy == Acausal(1, sink_blocks=1)
    scores, valid = random_scores(300, 300, (64, 64)), causal_blocks(300, 300, (64, 64))
    assert torch.equal(chosen(policy, scores, 300, 300, (64, 64)), valid.expand(2, 3, 5, 5))
    own = torch.eye(5, dtype=torch.bool).expand(2, 3, 5, 5)
    assert torch.equal(chosen(Lazy(1), scores, 300, 300, (64, 64)), own)


@dataclass(frozen=True)
class Worst(TopK):
    """Chooses in code of its own where its base has a rule."""

    name: ClassVar[str] = "worst"

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        return super().choose(-scores, valid, block_tokens)


def test_who_chooses_in_code_inherits_no_rule() -> None:
    assert rule_of(TopK(0.1), 40, 64) == Rule("count", 2)
    for policy in (Worst(0.1), Worst(0.1).for_prompt(40, 64, rows_after=0), Lazy(0)):
        assert rule_of(policy, 40, 64) is None
        assert policy.expected_density(40, 64) is None
    scores = torch.arange(6.0).expand(1, 1, 6, 6)
    last = chosen(Worst(0.3), scores, 384, 384, (64, 64))[0, 0, 5]
    assert last.tolist() == [True, False, False, False, False, True], "its own, and the own block on top"
    with pytest.raises(NotImplementedError, match="the policy neither must override rule or choose"):
        chosen(type("Neither", (Policy,), {"name": "neither"})(), scores, 384, 384, (64, 64))


def test_a_piece_goes_by_the_rule_of_the_whole_prompt() -> None:
    policy = TopK(0.3, sink_blocks=1, dense_last_rows=2)
    piece = policy.for_prompt(100, 64, rows_after=2)
    assert rule_of(piece, 10, 64) == policy.rule(100, 64)
    assert (piece.sink_blocks, piece.dense_last_rows) == (1, 0)
    assert [policy.for_prompt(100, 64, rows_after=n).dense_last_rows for n in (0, 1, 3)] == [2, 1, 0]
    assert str(piece) == "top_k:0.3,sink_blocks=1"


def test_knobs_by_example() -> None:
    scores = torch.zeros(1, 1, 5, 5)

    def rows(policy: Policy) -> list[str]:
        mask = chosen(policy, scores, 300, 300, (64, 64))[0, 0]
        return ["".join(".x"[int(x)] for x in row) for row in mask]

    assert rows(Lazy(0)) == ["x....", ".x...", "..x..", "...x.", "....x"]
    assert rows(Lazy(0, sink_blocks=2)) == ["x....", "xx...", "xxx..", "xx.x.", "xx..x"]
    assert rows(Lazy(0, local_blocks=2)) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert rows(Lazy(0, dense_last_rows=2)) == ["x....", ".x...", "..x..", "xxxx.", "xxxxx"]
    assert rows(Lazy(0, local_blocks=99)) == ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]
    # What is read anyway counts; equal scores go to the lower block.
    assert rows(TokenBudget(192)) == ["x....", "xx...", "xxx..", "xx.x.", "xx..x"]
    assert rows(TokenBudget(192, local_blocks=2)) == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]
    assert rows(TokenBudget(64, sink_blocks=2)) == rows(Lazy(0, sink_blocks=2))
    assert rows(TokenBudget(64, dense_last_rows=2)) == rows(Lazy(0, dense_last_rows=2))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_short_prompts(policy: Policy, tokens: int) -> None:
    blocks = 1 + (tokens > 64)
    mask = chosen(policy, torch.zeros(1, 1, blocks, blocks), tokens, tokens, (64, 64))
    assert mask.diagonal(dim1=2, dim2=3).all()
    assert not mask.triu(1).any()


def test_scores_of_another_length() -> None:
    message = r"scores must be \[B, H, 5, 5\] for 300 queries and 300 keys .* got \[1, 1, 4, 5\]"
    with pytest.raises(ValueError, match=message):
        chosen(TopK(0.1), torch.zeros(1, 1, 4, 5), 300, 300, (64, 64))
    with pytest.raises(ValueError, match=r"got \[5, 5\]"):
        chosen(TopK(0.1), torch.zeros(5, 5), 300, 300, (64, 64))
