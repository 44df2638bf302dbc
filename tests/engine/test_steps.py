"""Buffers of decoding hold what prefill would keep, in whatever steps the keys came."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seerattention import AttnGate, GateConfig, baselines
from seerattention.engine.call import AttentionCall, Cached, Given, Held, Step
from seerattention.engine.kept import Kept, sums_of
from seerattention.engine.padding import Lengths, Padding
from seerattention.engine.steps import Steps, ample
from seerattention.engine.summaries import Growing
from seerattention.rows import Rows

BLOCK = 16
GATE = AttnGate(GateConfig(num_heads=4, num_kv_heads=2, head_dim=8, block_size=BLOCK, k_sub_block=8))
QUEST = baselines.create("quest", block_size=(BLOCK, BLOCK))


class Text:
    """Keys of a batch before and after RoPE, and a growing cache that they come into."""

    def __init__(self, tokens: int, begins: list[int]) -> None:
        self.nope, self.k = torch.randn(2, len(begins), 2, tokens, 8).unbind(0)
        self.begins, self.end = begins, 0
        self.held: Held | None = None
        self.summaries = Growing()

    def given(self, new: int) -> tuple[Given, Cached]:
        before = self.held
        self.end += new
        k = self.k[:, :, : self.end].clone()
        self.held = Held.of(k, None)
        q = torch.zeros(len(k), 4, new, 8)
        return Given(q, k, k, q, self.nope[:, :, self.end - new : self.end]), Cached(before, self.held)

    def call(self, given: Given, cached: Cached) -> AttentionCall:
        real = torch.arange(self.end) >= torch.tensor(self.begins)[:, None]
        new, padding = given.q.shape[2], Padding.of(real, given.q.shape[2])
        rows = Rows.last(new, self.end) if padding is None else padding.rows
        return AttentionCall(0, given, rows, 1.0, padding=padding, cached=cached)

    def prompt(self, new: int, scorer: Any) -> None:
        call = self.call(*self.given(new))
        assert not any(self.summaries.follow(call, scorer, None))

    def step(self, new: int, scorer: Any) -> None:
        given, cached = self.given(new)
        real = torch.arange(self.end) >= torch.tensor(self.begins)[:, None]
        lengths = Lengths.of(real, self.end, new, batch=len(given.k), device=given.k.device)
        assert lengths is not None

        def call() -> AttentionCall:
            return self.call(given, cached)

        assert (
            self.summaries.step(Step(0, given, lengths, self.summaries, cached, call, 1.0), scorer, None)
            is None
        )

    def crop(self, tokens: int) -> None:
        assert self.held is not None
        self.end -= tokens
        self.held = Held.of(self.held.keys[:, :, : self.end], None)

    def check(self, scorer: Any) -> None:
        """Every row's summaries are those of its keys at once."""
        steps, source = self.summaries.steps, self.k if scorer.after_rope else self.nope
        assert steps is not None
        for row, begin in enumerate(self.begins):
            whole = (self.end - begin) // BLOCK * BLOCK
            own = source[row : row + 1, :, begin : begin + whole]
            expected = scorer.compress(own, positions=torch.arange(whole)) if whole else own[..., :0, :]
            got = steps.summaries[row : row + 1, :, : expected.shape[2]]
            eps = torch.finfo(torch.float32).eps
            if whole:
                torch.testing.assert_close(got, expected, rtol=0, atol=8 * eps * float(expected.abs().max()))
            tail = source[row, :, begin + whole : self.end]
            assert torch.equal(steps.tail[row, :, : tail.shape[1]], tail)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(8, 70),
    st.lists(st.tuples(st.integers(1, BLOCK - 1), st.integers(0, 20)), min_size=1, max_size=12),
    st.sampled_from([[0], [0, 5], [7, 0, 3]]),
    st.sampled_from(["gate", "quest"]),
)
@torch.no_grad()
def test_steps_and_crops_leave_what_at_once_would(
    prompt: int, parts: list[tuple[int, int]], begins: list[int], name: str
) -> None:
    torch.manual_seed(prompt)
    scorer, text = (GATE if name == "gate" else QUEST), Text(70 + 12 * BLOCK, begins)
    if name == "gate":
        # What a crop lost is made again from the cache, here without turning back.
        text.k = text.nope
    text.prompt(prompt, scorer)
    for new, gone in parts:
        text.step(new, scorer)
        text.check(scorer)
        text.crop(min(gone, text.end - max(begins) - 1))


@pytest.mark.parametrize("tokens", [[40, 40], [48, 33], [15, 64]])
@torch.no_grad()
def test_kept_goes_into_the_buffers_and_back(tokens: list[int]) -> None:
    k, cached = torch.randn(2, 2, 2, 64, 8).unbind(0)
    kept = Kept.nothing(cached, GATE).extended(k, cached, tokens)
    steps = Steps.empty(kept, 100).filled(kept, tokens, [0, 0])
    assert steps.room == 112
    assert steps.serves(kept, 112)
    assert not steps.serves(kept, 113)
    back = steps.kept(cached, tokens, kept.left)
    for row, n in enumerate(tokens):
        whole = n // BLOCK * BLOCK
        entries = whole // GATE.tokens_per_summary
        for got, expected in (
            (back.finished, kept.finished),
            (back.sums, kept.sums),
            (back.tail, kept.tail),
            (back.tail_sums, kept.tail_sums),
        ):
            if got is None or expected is None:
                assert not entries
                continue
            width = {id(back.finished): entries, id(back.sums): whole}.get(id(got), n - whole)
            assert torch.equal(got[row, :, :width], expected[row, :, :width])
    assert torch.equal(steps.sharing(kept).read(), kept.read())
    grown = steps.grown(2000)
    assert grown.room >= ample(2000)
    assert torch.equal(grown.summaries[:, :, : steps.summaries.shape[2]], steps.summaries)
    assert sums_of(cached).shape == cached.shape[:3]


def test_what_is_left_of_the_tail() -> None:
    steps = Steps(GATE, torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, BLOCK, 8), [40, 48, 33], [0, 0, 0])
    assert steps.left([40, 48, 33]) == [40, 48, 33]
    # The second's third block is finished: what is in the tail may be no key of it any more.
    assert steps.left([35, 35, 32]) == [35, 32, 32]
    assert steps.left([31, 31, 20]) == [16, 16, 16]
    assert steps.left([32, 16, 0]) == [32, 16, 0]


@torch.no_grad()
def test_a_copy_has_buffers_of_its_own() -> None:
    text = Text(90, [0])
    text.prompt(40, GATE)
    text.step(1, GATE)
    assert text.held is not None
    memo: dict[int, Any] = {}
    copied = Text.__new__(Text)
    copied.__dict__ |= {**text.__dict__, "held": Held.of(copy.deepcopy(text.held.keys, memo), None)}
    copied.summaries = copy.deepcopy(text.summaries, memo)
    for _ in range(30):
        text.step(1, GATE)
    for one in (text, copied):
        one.check(GATE)
    assert copied.summaries.steps is not None
    assert text.summaries.steps is not None
    assert copied.summaries.steps.tail.data_ptr() != text.summaries.steps.tail.data_ptr()
