"""Summaries that grow by steps are those of all keys at once."""

from __future__ import annotations

import pytest
import torch

from seerattention.baselines import create
from seerattention.gate import AttnGate, GateConfig
from seerattention.ops.cases.select_decode_blocks import CASES
from seerattention.ops.update_summaries import reference, update_summaries
from seerattention.testing.summaries import check_updates

BLOCK = 16


def gate_of(**design):
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "block_size": BLOCK}
    return AttnGate(GateConfig(**sizes, **design)).requires_grad_(False)


def grown(scorer, k, begins, tokens, steps, entries):
    """Summarise the first tokens of every sequence at once and the others in steps."""
    batch, heads, _, dim = k.shape
    summaries, tail = torch.full(entries, torch.nan), torch.full((batch, heads, BLOCK, dim), torch.nan)
    for row, begin in enumerate(begins):
        if whole := begin // BLOCK * BLOCK:
            made = scorer.compress(k[row : row + 1, :, :whole], positions=torch.arange(whole))
            summaries[row, :, : made.shape[2]] = made[0]
        tail[row, :, : begin % BLOCK] = k[row, :, whole:begin]
    lengths = torch.tensor(begins, dtype=torch.int32)
    for _ in range(steps):
        places = lengths[:, None] + torch.arange(tokens)
        new = torch.stack([k[row, :, at] for row, at in enumerate(places)])
        lengths += tokens
        update_summaries(summaries, tail, new, scorer, lengths=lengths)
    return summaries, tail, lengths.tolist()


@pytest.mark.parametrize("tokens", [1, 3, 15])
@pytest.mark.parametrize(
    "design", [{}, {"per_kv_head": True, "q_sub_block": 1, "k_sub_block": None, "qk_norm": True}]
)
def test_steps_make_the_summaries_of_all_keys(tokens, design):
    gate = gate_of(**design)
    scorer, per_block = gate.per_token(), BLOCK // gate.config.k_sub
    torch.manual_seed(1)
    k, steps = torch.randn(3, 2, 128, 16), 45 // tokens
    entries = (3, 2, 8 * per_block, gate.config.dim)
    summaries, tail, lengths = grown(scorer, k, [0, 16, 37], tokens, steps, entries)
    for row, length in enumerate(lengths):
        whole = length // BLOCK
        expected = gate.compress(k[row : row + 1, :, : whole * BLOCK], positions=torch.arange(whole * BLOCK))
        torch.testing.assert_close(summaries[row, :, : whole * per_block], expected[0])
        # Nothing was written past the finished blocks.
        assert summaries[row, :, whole * per_block :].isnan().all()
        assert torch.equal(tail[row, :, : length % BLOCK], k[row, :, whole * BLOCK : length])


def test_summaries_of_a_baseline():
    scorer = create("quest", block_size=(BLOCK, BLOCK)).per_token()
    torch.manual_seed(1)
    k = torch.randn(1, 2, 64, 16)
    summaries, _, _ = grown(scorer, k, [10], 2, 20, (1, 2, 4, 32))
    torch.testing.assert_close(summaries[:, :, :3], scorer.compress(k, positions=torch.arange(64))[:, :, :3])


def test_room_that_ends_inside_a_block_is_not_written():
    gate = gate_of(k_sub_block=4)
    k = torch.randn(1, 2, 24, 16)
    summaries, _, _ = grown(gate.per_token(), k, [16], 1, 8, (1, 2, 6, gate.config.dim))
    assert summaries[:, :, 4:].isnan().all()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"k": (1, 2, 16, 16)}, "a step adds 1 to 15 tokens"),
        ({"tail": (1, 2, 8, 16)}, r"tail must be \[B, Hk, 16, D\]"),
        ({"summaries": (2, 2, 8, 16)}, "k is of 1 sequences"),
    ],
)
def test_refusals(shapes, message):
    sizes = {"summaries": (1, 2, 8, 16), "tail": (1, 2, 16, 16), "k": (1, 2, 1, 16)} | shapes
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    with pytest.raises(ValueError, match=message):
        update_summaries(
            **tensors, scorer=gate_of(gate_dim=16).per_token(), lengths=torch.tensor([5], dtype=torch.int32)
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_check(case):
    check_updates(reference, case)


class Stale:
    """The finished block is not written."""

    @staticmethod
    def run(summaries, tail, k, scorer, lengths):
        reference.run(summaries.clone(), tail, k, scorer, lengths)


class OneBlockOn:
    """A block's summaries are written in the places, and turned to the positions, of the next one."""

    @staticmethod
    def run(summaries, tail, k, scorer, lengths):
        reference.run(summaries, tail, k, scorer, lengths + BLOCK)


class ItsOwnTokensOnly:
    """A step that goes on into the next block leaves that block's tokens out of the tail."""

    @staticmethod
    def run(summaries, tail, k, scorer, lengths):
        old = tail.clone()
        reference.run(summaries, tail, k, scorer, lengths)
        ends = (lengths % BLOCK)[:, None, None, None]
        place = torch.arange(BLOCK)[None, None, :, None]
        tail.copy_(torch.where((ends < k.shape[2]) & (place < ends), old, tail))


@pytest.mark.parametrize(
    ("bug", "name"), [(Stale, "one-token"), (OneBlockOn, "one-token"), (ItsOwnTokensOnly, "drafted")]
)
def test_planted_bugs_are_noticed(bug, name):
    with pytest.raises(AssertionError):
        check_updates(bug, next(case for case in CASES if case.name == name))
