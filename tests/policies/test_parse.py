from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerattention.policies import Policy, Threshold, TokenBudget, TopK, TopP, parse, policies

KNOBS = st.fixed_dictionaries(
    {},
    optional={
        "sink_blocks": st.integers(0, 1000),
        "local_blocks": st.integers(1, 1000),
        "dense_last_rows": st.integers(0, 1000),
    },
)
POSITIVE = st.floats(0, 1, exclude_min=True)
ANY = st.one_of(
    st.builds(lambda x, k: Threshold(x, **k), st.floats(0, 1, exclude_max=True), KNOBS),
    st.builds(lambda x, k: TopK(x, **k), POSITIVE, KNOBS),
    st.builds(lambda x, k: TopP(x, **k), POSITIVE, KNOBS),
    st.builds(lambda x, k: TokenBudget(x, **k), st.integers(1, 10**9), KNOBS),
)


@given(ANY)
def test_text_form_and_back(policy: Policy) -> None:
    assert parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("threshold:5e-4,dense_last_rows=2", Threshold(5e-4, dense_last_rows=2)),
        ("top_k:0.1", TopK(0.1)),
        ("top_k:1", TopK(1.0)),
        (" top_p:0.95, sink_blocks=1, local_blocks=3 ", TopP(0.95, sink_blocks=1, local_blocks=3)),
        ("token_budget:4096", TokenBudget(4096)),
    ],
)
def test_written_by_hand(text: str, policy: Policy) -> None:
    assert parse(text) == policy


def test_defaults_are_left_out() -> None:
    assert str(TopK(0.1)) == "top_k:0.1"
    assert str(TokenBudget(2**20, sink_blocks=1)) == "token_budget:1048576,sink_blocks=1"


def test_every_policy_has_a_name() -> None:
    assert {"threshold", "top_k", "top_p", "token_budget"} <= set(policies())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown policy ''; write one of .*threshold:<value>.*top_k:<density>"),
        ("dense", "unknown policy 'dense'"),
        ("top_k", "unknown policy 'top_k'"),
        ("topk:0.1", "unknown policy 'topk:0.1'"),
        ("top_k:", "density in policy 'top_k:' must be a number, got ''"),
        ("top_k:much", "density in policy 'top_k:much' must be a number, got 'much'"),
        ("top_k:0.1,sinks=2", "unknown knob 'sinks=2' .* the knobs are sink_blocks=<blocks>"),
        ("top_k:0.1,sink_blocks", "unknown knob 'sink_blocks'"),
        ("top_k:0.1,density=0.2", "unknown knob 'density=0.2'"),
        ("top_k:0.1,sink_blocks=x", "sink_blocks in policy .* must be a number, got 'x'"),
        ("top_k:0.1,sink_blocks=1.5", "sink_blocks must be a whole number >= 0, got 1.5"),
        ("top_k:0.1,local_blocks=0", "local_blocks must be a whole number >= 1, got 0"),
        ("top_k:0.1,dense_last_rows=-1", "dense_last_rows must be a whole number >= 0, got -1"),
        ("top_k:0", r"density must be in \(0, 1\], got 0"),
        ("top_k:1.01", r"density must be in \(0, 1\], got 1.01"),
        ("top_k:nan", r"density must be in \(0, 1\], got nan"),
        ("threshold:1", r"threshold must be in \[0, 1\), got 1"),
        ("threshold:-0.1", r"threshold must be in \[0, 1\), got -0.1"),
        ("top_p:0", r"mass must be in \(0, 1\], got 0"),
        ("top_p:1.5", r"mass must be in \(0, 1\], got 1.5"),
        ("token_budget:0", "tokens must be a whole number >= 1, got 0"),
        ("token_budget:0.5", "tokens must be a whole number >= 1, got 0.5"),
    ],
)
def test_what_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
