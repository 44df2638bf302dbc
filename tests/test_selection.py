from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seerattention import BlockSelection, causal_blocks
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing.inputs import random_selection


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """A mask without empty rows."""
    b, h, nq, nk = (draw(st.integers(1, n)) for n in (2, 3, 5, 70))
    seed, density = draw(st.integers(0, 2**31)), draw(st.floats(0, 1))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, h, nq, nk, generator=generator) < density
    keep = torch.randint(nk, (b, h, nq, 1), generator=generator)
    return mask.scatter(-1, keep, True)


@given(masks())
def test_mask_round_trip(mask: Tensor) -> None:
    selection = BlockSelection.from_mask(mask, (16, 32))
    assert selection.shape == tuple(mask.shape)
    assert selection.block_size == (16, 32)
    assert torch.equal(selection.to_mask(), mask)
    assert torch.equal(selection.counts, mask.sum(-1, dtype=torch.int32))
    assert selection.nbytes == 4 * mask.shape[:3].numel() * -(-mask.shape[3] // 32)


@given(masks())
def test_rows_ascend(mask: Tensor) -> None:
    selection = BlockSelection.from_mask(mask, (16, 16))
    offsets, indices = selection.rows()
    flat = mask.flatten(0, 2)
    for row in range(len(flat)):
        blocks = indices[offsets[row] : offsets[row + 1]]
        assert blocks.tolist() == [j for j in range(mask.shape[-1]) if flat[row, j]]


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_causal_and_own_blocks_from_tokens(queries: int, past: int, block_q: int, block_k: int) -> None:
    keys = queries + past
    causal = causal_blocks(queries, keys, (block_q, block_k))
    own = Rows.last(queries, keys).own((block_q, block_k))
    for i in range(causal.shape[0]):
        rows = range(past + i * block_q, past + min((i + 1) * block_q, queries))
        for j in range(causal.shape[1]):
            columns = range(j * block_k, min((j + 1) * block_k, keys))
            assert bool(causal[i, j]) == any(c <= r for r in rows for c in columns)
            assert bool(own[i, j]) == bool(set(rows) & set(columns))


@pytest.mark.parametrize(("queries", "keys"), [(0, 4), (5, 4), (-1, 4)])
def test_impossible_lengths(queries: int, keys: int) -> None:
    with pytest.raises(ValueError, match=f"Tq={queries} and Tk={keys}"):
        causal_blocks(queries, keys, (2, 2))


def test_density() -> None:
    valid = causal_blocks(256, 256, (64, 64))
    assert BlockSelection.full(Rows.last(256, 256), (64, 64)).density(valid) == 1
    diagonal = BlockSelection.from_mask(torch.eye(4, dtype=torch.bool).expand(2, 3, 4, 4), (64, 64))
    assert diagonal.density(valid) == 4 / 10
    with pytest.raises(ValueError, match=r"valid must be \[4, 4\], got \[2, 4\]"):
        diagonal.density(causal_blocks(128, 256, (64, 64)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 2, dtype=torch.bool), r"bool mask \[B, H, Nq, Nk\], got torch.bool \[2, 2\]"),
        (torch.ones(1, 1, 2, 2), r"got torch.float32 \[1, 1, 2, 2\]"),
        (torch.tensor([[[[True, False], [False, False]]]]), "row 1 of the mask selects no block"),
    ],
)
def test_from_mask_refuses(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSelection.from_mask(mask, (64, 64))


@pytest.mark.parametrize(
    ("queries", "keys", "block_size"),
    [
        (300, 300, (64, 64)),
        (100, 420, (64, 64)),
        (77, 301, (64, 64)),
        (300, 300, (128, 64)),
        (1, 1, (64, 64)),
    ],
)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_flex_form_agrees(queries: int, keys: int, block_size: tuple[int, int], heads: int) -> None:
    shape = Shape(
        name="", heads=4, kv_heads=2, queries=queries, keys=keys, head_dim=8, block_size=block_size, batch=2
    )
    selection = random_selection(shape, density=0.4, heads=heads)
    flex = selection.to_flex(Rows.last(queries, keys), 4)
    mask = selection.to_mask().repeat_interleave(4 // heads, 1)
    assert torch.equal(flex.to_dense().bool(), mask)
    # Blocks without a mask inside must need none: the block's last key is before the row's first query.
    assert flex.full_kv_num_blocks is not None
    assert torch.equal(flex.full_kv_num_blocks, (mask & ~Rows.last(queries, keys).own(block_size)).sum(-1))


def test_storage_at_128k_tokens() -> None:
    nq = nk = 128 * 1024 // 64
    keep = torch.rand(1, 1, nq, nk) < 0.1
    keep = (keep & causal_blocks(nq * 64, nk * 64, (64, 64))) | torch.eye(nq, dtype=torch.bool)
    one_head = BlockSelection.from_mask(keep, (64, 64))
    assert 0.09 < one_head.density(causal_blocks(nq * 64, nk * 64, (64, 64))) < 0.11
    assert 32 * one_head.nbytes <= 64e6


def test_short_prompts() -> None:
    for tokens, blocks in ((1, 1), (63, 1), (64, 1), (65, 2)):
        full = BlockSelection.full(Rows.last(tokens, tokens), (64, 64))
        assert full.shape == (1, 1, blocks, blocks)
        assert torch.equal(full.to_mask()[0, 0], torch.ones(blocks, blocks, dtype=torch.bool).tril())


def test_check_finds_what_kernels_rely_on() -> None:
    good = BlockSelection.full(Rows.last(100, 292), (64, 64))
    good.check(Rows.last(100, 292))
    with pytest.raises(ValueError, match=r"but 100 queries and 200 keys make \[2, 4\] blocks"):
        good.check(Rows.last(100, 200))

    def changed(bits: list[int]) -> BlockSelection:
        return BlockSelection(torch.tensor([[[[b] for b in bits]]], dtype=torch.int32), good.shape, (64, 64))

    changed([0b01111, 0b11111]).check(Rows.last(100, 292))
    with pytest.raises(ValueError, match=r"row \[0, 0, 1\] .* selects no block"):
        changed([1, 0]).check(Rows.last(100, 292))
    with pytest.raises(ValueError, match=r"row \[0, 0, 0\] .* has bits set past its 5 blocks"):
        changed([1 | 1 << 5, 1]).check(Rows.last(100, 292))
    with pytest.raises(ValueError, match=r"row \[0, 0, 0\] .* selects a block that lies after its queries"):
        changed([0b11111, 1]).check(Rows.last(100, 292))


def test_row_slice_shares_storage() -> None:
    selection = BlockSelection.full(Rows.last(300, 300), (64, 64))
    part = selection.row_slice(1, 3)
    assert part.shape == (1, 1, 2, 5)
    assert torch.equal(part.to_mask(), selection.to_mask()[:, :, 1:3])
    assert part.bits.untyped_storage().data_ptr() == selection.bits.untyped_storage().data_ptr()
