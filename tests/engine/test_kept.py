from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seerattention import AttnGate, GateConfig
from seerattention.engine.kept import Kept, sums_of

GATE = AttnGate(GateConfig(num_heads=4, num_kv_heads=2, head_dim=16, block_size=32))
FINER = AttnGate(GateConfig(num_heads=4, num_kv_heads=2, head_dim=16, block_size=32, k_sub_block=8))


def keys(tokens: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randn(rows, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def fed(*pieces: int) -> tuple[Kept, Tensor, Tensor]:
    """Summaries fed in pieces, the keys before and after the rotary embedding."""
    k, cached = keys(sum(pieces)), keys(sum(pieces), 1)
    kept, end = Kept.nothing(cached, GATE), 0
    for piece in pieces:
        start, end = end, end + piece
        assert kept.compared(cached[:, :, :end], [start]).tokens == [start]
        kept = kept.extended(k[:, :, start:end], cached[:, :, start:end], [piece])
    assert kept.tokens == [end]
    return kept, k, cached


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order in which a product of another size adds up."""
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * eps * float(expected.abs().max()))


def at_once(k: Tensor, gate: AttnGate = GATE) -> Tensor:
    return gate.compress(k, positions=torch.arange(k.shape[2]))


@pytest.mark.parametrize(
    "pieces", [(100,), (32, 68), (1,) * 70, (31, 1, 1, 67), (64, 36), (33, 33, 33), (5,), (32,)]
)
@torch.no_grad()
def test_fed_in_pieces_is_fed_at_once(pieces: tuple[int, ...]) -> None:
    kept, k, _ = fed(*pieces)
    assert_same(kept.read(), at_once(k))


@torch.no_grad()
def test_cropped_to_whole_blocks_goes_on() -> None:
    for left in (32, 64, 96):
        kept, k, cached = fed(100)
        kept = kept.compared(cached[:, :, :left], [left])
        assert kept.tokens == [left]
        kept = kept.extended(k[:, :, left:], cached[:, :, left:], [100 - left])
        assert_same(kept.read(), at_once(k))


@torch.no_grad()
def test_cropped_inside_the_tail_goes_on() -> None:
    kept, k, cached = fed(100)
    kept = kept.compared(cached[:, :, :98], [98])
    assert kept.tokens == [98]
    assert_same(kept.read(), at_once(k[:, :, :98]))


@torch.no_grad()
def test_cropped_inside_a_finished_block_keeps_those_before() -> None:
    kept, k, cached = fed(100)
    kept = kept.compared(cached[:, :, :50], [50])
    assert kept.tokens == [32]
    kept = kept.extended(k[:, :, 32:], cached[:, :, 32:], [68])
    assert_same(kept.read(), at_once(k))


@torch.no_grad()
def test_foreign_keys_are_never_kept() -> None:
    cached = fed(100)[2]
    foreign = {name: cached.clone() for name in ("second block", "first block", "tail")}
    foreign["second block"][:, :, 63] += 1
    foreign["first block"][:, :, 0] += 1
    foreign["tail"][:, :, 97] += 1
    foreign |= {"swapped": cached.flip(1), "longer": torch.cat([cached, keys(1)], 2)}
    expected = [32, 0, 97, 0, 100]
    for (name, other), tokens in zip(foreign.items(), expected, strict=True):
        kept, k, cached = fed(100)
        kept = kept.compared(other, [other.shape[2]])
        assert kept.tokens == [tokens], name
        if tokens:
            assert_same(kept.read(), at_once(k[:, :, :tokens]))
    kept = fed(100)[0]
    assert kept.compared(cached.bfloat16(), [100]).tokens == [0]


@torch.no_grad()
def test_nothing_cached_starts_anew() -> None:
    kept, _, cached = fed(100)
    kept = kept.compared(cached[:, :, :1], [0])
    assert kept.tokens == [0]
    other = keys(70, 5)
    assert_same(kept.extended(other, other, [70]).read(), at_once(other))
    assert Kept.nothing(other, GATE).compared(other, [70]).tokens == [0]


@torch.no_grad()
def test_long_prompts_are_not_kept_alive() -> None:
    kept, _, _ = fed(32 * 100 + 5)
    for tensor, size in ((kept.sums, 8 * (32 * 100 + 5)), (kept.tail, 4 * 16 * 5), (kept.tail_sums, 8 * 5)):
        assert tensor.untyped_storage().nbytes() == 2 * size


@pytest.mark.parametrize("gate", [GATE, FINER], ids=["blocks", "sub-blocks"])
@pytest.mark.parametrize(
    "pieces",
    [
        [(100, 33, 5)],
        [(64, 32, 96)],
        [(40, 0, 7), (30, 90, 1), (1, 1, 1)],
        [(1, 2, 3)] * 40,
        [(32, 64, 0), (0, 0, 70), (5, 32, 27)],
    ],
)
@torch.no_grad()
def test_rows_of_different_lengths_are_those_alone(gate: AttnGate, pieces: list[tuple[int, ...]]) -> None:
    totals = [sum(of_row) for of_row in zip(*pieces, strict=True)]
    k, cached = keys(max(totals), rows=3), keys(max(totals), 1, rows=3)
    kept, done = Kept.nothing(cached, gate), [0, 0, 0]
    for new in pieces:
        ends = [a + b for a, b in zip(done, new, strict=True)]
        assert kept.compared(cached, done).tokens == done
        part, part_cached = (torch.full((3, 2, max(new), 16), 9.0) for _ in range(2))
        for row, (start, end) in enumerate(zip(done, ends, strict=True)):
            part[row, :, : end - start] = k[row, :, start:end]
            part_cached[row, :, : end - start] = cached[row, :, start:end]
        kept, done = kept.extended(part, part_cached, list(new)), ends
    assert kept.tokens == totals
    together = kept.read()
    assert together.isfinite().all()
    for row, tokens in enumerate(totals):
        alone = at_once(k[row : row + 1, :, :tokens], gate)
        assert_same(together[row : row + 1, :, : alone.shape[2]], alone)
    # One row lost its second block, one a token of its tail, one nothing.
    cached[0, :, 40] += 1
    cached[1, :, totals[1] - 1] += 1
    left = kept.compared(cached, totals).tokens
    assert left[0] == (32 if totals[0] > 40 else totals[0])
    assert left[1:] == [max(totals[1] - 1, 0) if totals[1] % 32 else totals[1] - 32, totals[2]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans())
def test_fed_in_pieces_equals_fed_at_once(pieces: list[int], sub_blocks: bool) -> None:
    config = GateConfig(4, 2, 8, block_size=16, k_sub_block=8 if sub_blocks else None)
    gate, length = AttnGate(config), sum(pieces)
    k, cached = torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    kept, done = Kept.nothing(cached, gate), 0
    with torch.no_grad():
        at_once = gate.compress(k, positions=torch.arange(length))
        exact = gate.double().compress(k.double(), positions=torch.arange(length))
        gate.float()
        for part, part_cached in zip(k.split(pieces, 2), cached.split(pieces, 2), strict=True):
            assert kept.compared(cached, [done] * 2).tokens == [done] * 2
            kept = kept.extended(part, part_cached, [part.shape[2]] * 2)
            done += part.shape[2]
        got = kept.read()
    assert got.shape == at_once.shape
    assert (got.double() - exact).abs().max() <= 2 * (at_once.double() - exact).abs().max() + 4 * torch.finfo(
        torch.float32
    ).eps * exact.abs().max()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(0, 69), st.integers(0, 1), st.integers(0, 7))
def test_any_changed_bit_is_noticed(length: int, token: int, head: int, dim: int) -> None:
    gate = AttnGate(GateConfig(4, 2, 8, block_size=16))
    k, cached = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    with torch.no_grad():
        kept = Kept.nothing(cached, gate).extended(k, cached, [length])
    changed, at = cached.clone(), token % length
    place = (0, head, at, dim)
    changed[place] = torch.nextafter(changed[place], torch.tensor(torch.inf))
    # Everything before the block that it is in is kept, and of the last, unfinished one what comes before.
    assert kept.compared(cached, [length]).tokens == [length]
    kept = kept.compared(changed, [length])
    left = at if at >= length // 16 * 16 else at // 16 * 16
    assert kept.tokens == [left]
    assert kept.compared(cached, [length]).tokens == [left]


@pytest.mark.parametrize("dim", [128, 7, 131, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sums_are_of_bits_wherever_they_lie(dim: int, dtype: torch.dtype) -> None:
    k = torch.randn(2, 3, 5, dim, dtype=dtype)
    sums = sums_of(k)
    assert sums.shape == k.shape[:3]
    assert sums.dtype == torch.int64
    wide = torch.zeros(2, 3, 5, dim + 3, dtype=dtype)
    wide[..., 1 : dim + 1] = k
    odd = torch.zeros(k.numel() + 1, dtype=dtype)[1:].view_as(k).copy_(k)
    for same in (
        wide[..., 1 : dim + 1],
        odd,
        k.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.clone().mT,
    ):
        assert torch.equal(sums_of(same), sums)
    one = k[:1].as_strided(k[:1].shape, (1, *k.stride()[1:]))
    assert torch.equal(sums_of(one), sums[:1])


def test_a_cut_inside_a_finished_block_keeps_the_blocks_before() -> None:
    """Even where all cached keys are alike: the raw keys of that block are gone."""
    cached = torch.ones(1, 2, 40, 8)
    kept = Kept.nothing(cached, AttnGate(GateConfig(4, 2, 8, block_size=16)))
    with torch.no_grad():
        kept = kept.extended(torch.randn(1, 2, 40, 8), cached, [40])
    for left, tokens in ((36, 36), (32, 32), (20, 16)):
        kept = kept.compared(cached[:, :, :left], [left])
        assert kept.tokens == [tokens]


@pytest.mark.parametrize("gone", [slice(0, 1), slice(20, 21), slice(97, 98), slice(0, 98), slice(10, 80)])
def test_keys_taken_out_are_told_from_a_crop(gone: slice) -> None:
    """Whatever came since: one token decoded, as many as were taken out, or a turn that was dense."""
    for more in (0, 1, gone.stop - gone.start, 200):
        kept, _, cached = fed(100)
        taken = torch.cat((cached[:, :, : gone.start], cached[:, :, gone.stop :], keys(more, 7)), 2)
        short = taken.shape[2] - more
        kept = kept.shrunk([short])
        assert kept.left == [short]
        kept = kept.compared(taken, [taken.shape[2]])
        assert kept.left == [short]
        # It stays so, also once nothing is known of these keys any more, until the cache is empty.
        kept = kept.cut([0]).compared(taken, [taken.shape[2]])
        assert kept.left == [short]
        assert kept.shrunk([0]).left == [0]
        kept = fed(100)[0].shrunk([short])
        assert kept.compared(torch.cat((cached[:, :, :short], keys(more, 7)), 2), [short + more]).left == [0]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 0], [2], [0, 0, 1, 1, 2, 2]])
@torch.no_grad()
def test_rows_that_trade_places_keep_their_summaries(order: list[int]) -> None:
    totals = [100, 70, 33]
    k, cached = keys(100, rows=3), keys(100, 1, rows=3)
    kept = Kept.nothing(cached, GATE).extended(k, cached, totals)
    past = [totals[row] for row in order]
    moved = kept.compared(cached[order], past)
    assert moved.tokens == past
    assert moved.left == [0] * len(order)
    together = moved.read()
    for i, (row, n) in enumerate(zip(order, past, strict=True)):
        alone = at_once(k[row : row + 1, :, :n])
        assert_same(together[i : i + 1, :, : alone.shape[2]], alone)
    # A row that begins as one of them and ends as another keeps the beginning; the third one ends before.
    mixed = torch.cat((cached[order[:1], :, :40], cached[(order[0] + 1) % 3][None, :, 40:]), 2)
    assert kept.compared(mixed.expand(len(order), -1, -1, -1), [60] * len(order)).tokens == [
        32 + (order[0] == 2)
    ] * len(order)
