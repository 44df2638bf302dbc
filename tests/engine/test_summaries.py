from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seerattention import AttnGate, GateConfig
from seerattention.engine.summaries import KeySummaries

GATE = AttnGate(GateConfig(num_heads=4, num_kv_heads=2, head_dim=16, block_size=32))


def keys(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def fed(*pieces: int) -> tuple[KeySummaries, Tensor, Tensor]:
    """Summaries fed in pieces, the keys before and after the rotary embedding."""
    k, cached = keys(sum(pieces)), keys(sum(pieces), 1)
    summaries, end = KeySummaries(GATE), 0
    for piece in pieces:
        start, end = end, end + piece
        assert summaries.keep(cached[:, :, :start]) == start
        summaries.extend(k[:, :, start:end], cached[:, :, start:end])
    assert summaries.tokens == end
    return summaries, k, cached


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order in which a product of another size adds up."""
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * eps * float(expected.abs().max()))


def at_once(k: Tensor) -> Tensor:
    return GATE.compress(k, positions=torch.arange(k.shape[2]))


@pytest.mark.parametrize(
    "pieces", [(100,), (32, 68), (1,) * 70, (31, 1, 1, 67), (64, 36), (33, 33, 33), (5,), (32,)]
)
@torch.no_grad()
def test_fed_in_pieces_is_fed_at_once(pieces: tuple[int, ...]) -> None:
    summaries, k, _ = fed(*pieces)
    assert_same(summaries.all(), at_once(k))


@torch.no_grad()
def test_cropped_to_whole_blocks_goes_on() -> None:
    for kept in (32, 64, 96):
        summaries, k, cached = fed(100)
        assert summaries.keep(cached[:, :, :kept]) == kept
        assert summaries.tokens == kept
        summaries.extend(k[:, :, kept:], cached[:, :, kept:])
        assert_same(summaries.all(), at_once(k))


@torch.no_grad()
def test_cropped_inside_the_tail_goes_on() -> None:
    summaries, k, cached = fed(100)
    assert summaries.keep(cached[:, :, :98]) == 98
    assert summaries.tokens == 98
    assert_same(summaries.all(), at_once(k[:, :, :98]))


@torch.no_grad()
def test_cropped_inside_a_finished_block_keeps_those_before() -> None:
    summaries, k, cached = fed(100)
    assert summaries.keep(cached[:, :, :50]) == 32
    summaries.extend(k[:, :, 32:], cached[:, :, 32:])
    assert_same(summaries.all(), at_once(k))


@torch.no_grad()
def test_foreign_keys_are_never_kept() -> None:
    cached = fed(100)[2]
    foreign = {name: cached.clone() for name in ("second block", "first block", "tail")}
    foreign["second block"][:, :, 63] += 1
    foreign["first block"][:, :, 0] += 1
    foreign["tail"][:, :, 97] += 1
    foreign |= {"swapped": cached.flip(1), "longer": torch.cat([cached, keys(1)], 2)}
    foreign |= {"two rows": cached.expand(2, -1, -1, -1), "another precision": cached.bfloat16()}
    expected = [32, 0, 96, 0, 100, 0, 0]
    for (name, other), tokens in zip(foreign.items(), expected, strict=True):
        summaries, k, cached = fed(100)
        assert summaries.keep(other) == tokens, name
        assert summaries.tokens == tokens, name
        if tokens:
            assert_same(summaries.all(), at_once(k[:, :, :tokens]))


@torch.no_grad()
def test_empty_cache_starts_anew() -> None:
    summaries, _, cached = fed(100)
    assert summaries.keep(cached[:, :, :0]) == 0
    assert summaries.tokens == 0
    other = keys(70, 5)
    summaries.extend(other, other)
    assert_same(summaries.all(), at_once(other))


def test_nothing_fed_keeps_nothing() -> None:
    assert KeySummaries(GATE).keep(keys(0)) == 0
    assert KeySummaries(GATE).keep(keys(32)) == 0


@torch.no_grad()
def test_long_prompts_are_not_kept_alive() -> None:
    summaries, _, _ = fed(32 * 100 + 5)
    kept = ((summaries.block_bits, 100, 8), (summaries.tail, 5, 4), (summaries.tail_bits, 5, 4))
    for tensor, tokens, size in kept:
        assert tensor is not None
        assert tensor.untyped_storage().nbytes() == size * 2 * tokens * 16
