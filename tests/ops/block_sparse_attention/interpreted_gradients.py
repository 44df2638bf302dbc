"""The backward's kernels in Triton's interpreter, on a CPU; `tests/ops/test_triton.py` runs this file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops import tma
from seerattention.ops.block_sparse_attention.kernels import backward
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.ops.language import INTERPRETED
from seerattention.ops.shapes import Shape
from seerattention.testing import gradients
from seerattention.testing.inputs import random_qkv, random_selection

# A query that sees nothing has a denominator of 0, whose logarithm the kernel takes on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")

TINY = Case(name="tiny", heads=2, kv_heads=1, queries=20, keys=58, head_dim=16, block_size=(16, 16))
PACKED = replace(TINY, queries=30, keys=45, lengths=((1, 1), (0, 0), (18, 33), (11, 11)))
CASES = {
    "later chunk": TINY,
    "one token": replace(TINY, queries=1, keys=1),
    "block and one, everything read": replace(TINY, queries=17, keys=17, density=1.0),
    "batch, no groups": replace(TINY, batch=2, kv_heads=2, queries=5, keys=35),
    "one kv head for many, padded dimension": replace(TINY, heads=4, queries=7, head_dim=24),
    "selection of kv heads, tiles of rows": replace(
        TINY, heads=4, kv_heads=2, queries=40, keys=40, block_size=(64, 16), selection_heads=2
    ),
    "one selection, tiles of columns": replace(TINY, block_size=(16, 64), selection_heads=1),
    "one query to a row": replace(TINY, queries=3, block_size=(1, 16)),
    "odd rows": replace(TINY, queries=30, block_size=(24, 16)),
    "packed, with all": replace(PACKED, block_size=(16, 32), softcap=3.0, sinks=True, selection_heads=1),
}


def test_this_is_the_interpreter() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    gradients.check_gradients(gradients.by_name("triton"), CASES[name])


@pytest.mark.parametrize("name", ["later chunk"])
def test_half_precision(name: str) -> None:
    gradients.check_gradients(gradients.by_name("triton"), CASES[name], torch.float16)


@pytest.mark.parametrize("block_size", [(16, 16), (24, 16)])
def test_tiles_by_tma(block_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def described(launch: object, rows: int, *tensors: Tensor) -> list[object]:
        made.append(rows)
        shape = [1, 1, rows, 32]
        return [tma.describe(x, list(x.shape), list(x.stride()), shape) for x in tensors]

    monkeypatch.setattr(backward, "tiles", described)
    gradients.check_gradients(gradients.by_name("triton"), replace(TINY, head_dim=24, block_size=block_size))
    # Rows that are no whole tiles keep their queries' addresses.
    assert len(made) == (4 if block_size[0] == 16 else 2)


def test_split_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every row reads the first block: its column is many times longer than a program's share.
    monkeypatch.setattr(backward, "FEWEST", 1)
    case = replace(TINY, queries=74, keys=74, density=0.0)
    call = gradients.Call.of(case)
    mask = call.selection.to_mask()
    mask[..., 0] = True
    call = replace(call, selection=BlockSelection.from_mask(mask, case.block_size))
    plans: list[Tensor] = []
    made = backward.split_columns

    def watched(counts: Tensor, tiles: int, programs: int) -> Tensor:
        plans.append(made(counts, tiles, programs))
        return plans[-1]

    monkeypatch.setattr(backward, "split_columns", watched)
    found = call.gradients(gradients.by_name("triton"))
    for name, budget in call.budgets().items():
        budget.check(found[name])
    assert plans[0][5:10].tolist() == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("programs", [1, 2, 132])
def test_the_plan_covers_every_column_within_its_workspace(
    programs: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "PLANNED", 256)
    generator = torch.Generator().manual_seed(0)
    for blocks in (
        torch.zeros(5, dtype=torch.int32),
        torch.full((7,), 1000, dtype=torch.int32),
        torch.tensor([100_000, *range(300)], dtype=torch.int32),
        torch.randint(0, 5000, (999,), generator=generator, dtype=torch.int32),
    ):
        plan = backward.split_columns(blocks, tiles, programs)
        counts = blocks.repeat_interleave(tiles)
        units = len(counts)
        first, parts, slot = plan[: 3 * units].view(3, -1)
        items, limit = plan[3 * units : 3 * units + 2].tolist()
        kept, owner = plan[3 * units + 2 :].split([units, units + 2 * programs])
        assert torch.equal(kept, counts)
        assert items == parts.sum() <= len(owner)
        assert limit >= backward.FEWEST
        assert (parts >= 1).all()
        assert (parts * limit >= counts).all()
        assert ((parts - 1) * limit < counts.clamp(min=1)).all()
        assert torch.equal(owner[:items], torch.arange(units, dtype=torch.int32).repeat_interleave(parts))
        assert torch.equal(owner[first], torch.arange(units, dtype=torch.int32))
        several = parts > 1
        taken = [
            s + i
            for s, n in zip(slot[several].tolist(), parts[several].tolist(), strict=True)
            for i in range(n)
        ]
        assert taken == list(range(len(taken)))
        assert len(taken) <= 4 * programs
        # No part is longer than half a program's share, unless it is short anyway.
        assert limit <= max(backward.FEWEST, -(-int(counts.sum()) // (2 * programs)))


def test_a_scale_that_is_not_positive() -> None:
    call = gradients.Call.of(replace(TINY, queries=7))
    call = replace(call, options=replace(call.options, scale=-0.3))
    found = call.gradients(gradients.by_name("triton"))
    for name, budget in call.budgets().items():
        budget.check(found[name])


def test_strides_do_not_matter() -> None:
    call = gradients.Call.of(TINY)
    expected = call.gradients(gradients.by_name("triton"))
    strided = replace(
        call,
        **{n: getattr(call, n).transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "grad")},
        v=torch.cat([call.v, call.v], -1)[..., :16],
    )
    # A part of fused queries, keys and values.
    fused = torch.cat([strided.q.transpose(1, 2)] * 2, 2)
    for q in (strided.q, fused[:, :, : TINY.heads].transpose(1, 2)):
        found = replace(strided, q=q).gradients(gradients.by_name("triton"))
        assert found["q"].stride() == strided.q.stride()
        for name, x in expected.items():
            assert torch.equal(found[name], x)


def test_a_gradient_may_be_one_number_for_all() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(TINY))
    selection = random_selection(TINY, density=0.4)
    found = [
        torch.autograd.grad(block_sparse_attention(q, k, v, selection, backend=name).sum(), (q, k, v))
        for name in ("triton", "reference")
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bits_that_no_selection_may_have_are_ignored() -> None:
    call = gradients.Call.of(replace(TINY, queries=26))
    bits = call.selection.bits.clone()
    # Columns past Nk, and the block after the first row's queries.
    bits |= ~0 << 4
    assert not (bits[:, :, 0] & 0b1000).any()
    bits[:, :, 0] |= 0b1000
    dirty = replace(call, selection=replace(call.selection, bits=bits))
    expected = call.gradients(gradients.by_name("triton"))
    for name, x in dirty.gradients(gradients.by_name("triton")).items():
        assert torch.equal(x, expected[name])


def test_queries_that_see_nothing_have_no_gradient() -> None:
    shape = Shape(name="", heads=1, kv_heads=1, queries=32, keys=32, head_dim=16, block_size=(16, 16))
    q, k, v = (x.requires_grad_() for x in random_qkv(shape))
    mask = torch.tensor([[0, 1], [1, 1]]).bool()[None, None]
    out = block_sparse_attention(q, k, v, BlockSelection.from_mask(mask, (16, 16)), backend="triton")
    out.square().sum().backward()
    assert (q.grad[:, :, :16] == 0).all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
