"""Gradients on a CPU; `interpreted_gradients.py` has the GPU's kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention import gather, hopper, triton
from seerattention.ops.cases.block_sparse_attention import CASES, OPTION_CASES, Case
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing import gradients
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.memory import LargestTensor
from seerattention.testing.mutants import GRADIENT_MUTANTS

BY_NAME = {case.name: case for case in (*CASES, *OPTION_CASES) if not case.large}
#: Few numbers, all kinds of blocks: unread ones, own ones, a short last one, two heads to a group.
TINY = Case(name="tiny", heads=4, kv_heads=2, queries=20, keys=110, head_dim=32, block_size=(16, 16))
NAMES = [
    *("one-token", "block-plus-one", "batch", "kv-selection", "one-selection", "later-chunk"),
    *("wide-rows", "wide-columns", "decode-rows", "softcap", "sinks", "softcap-and-sinks"),
]


@pytest.mark.parametrize("name", [*NAMES, "packed"])
def test_gather(name: str) -> None:
    gradients.check_gradients(gradients.by_name("gather"), BY_NAME[name])


@pytest.mark.parametrize("name", ["later-chunk", "softcap-and-sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gather_in_half_precision(name: str, dtype: torch.dtype) -> None:
    gradients.check_gradients(gradients.by_name("gather"), BY_NAME[name], dtype)


@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("kv_heads", [8, 1])
def test_gather_at_many_densities(density: float, kv_heads: int) -> None:
    case = replace(TINY, heads=8, kv_heads=kv_heads, queries=77, density=density)
    gradients.check_gradients(gradients.by_name("gather"), case)


def test_gather_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "WORK_BYTES", 1)
    gradients.check_gradients(gradients.by_name("gather"), TINY)


@pytest.mark.parametrize("name", GRADIENT_MUTANTS)
def test_planted_bugs_are_noticed(name: str) -> None:
    with pytest.raises(AssertionError, match="gradient of"):
        gradients.check_gradients(GRADIENT_MUTANTS[name], TINY)


@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(backend: str, softcap: float | None) -> None:
    case = Case(name="", heads=2, kv_heads=1, queries=5, keys=11, head_dim=3, block_size=(2, 4), density=0.4)
    selection = random_selection(case, density=case.density)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (*random_qkv(case, dtype=torch.float64), sinks)]

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(
            q, k, v, selection, softcap=softcap, sinks=sinks, return_lse=True, backend=backend
        )

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_of_the_inputs_learns(which: int) -> None:
    q, k, v = random_qkv(TINY)
    selection = random_selection(TINY, density=0.4)
    inputs = [x.requires_grad_(i == which) for i, x in enumerate((q, k, v))]
    out = block_sparse_attention(*inputs, selection)
    out.square().sum().backward()
    expected = block_sparse_attention(*inputs, selection, backend="reference")
    (gold,) = torch.autograd.grad(expected.square().sum(), inputs[which])
    torch.testing.assert_close(inputs[which].grad, gold)
    assert [x.grad is None for x in inputs] == [i != which for i in range(3)]
    with torch.no_grad():
        assert not block_sparse_attention(*inputs, selection).requires_grad


def test_gradients_of_gradients_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(TINY))
    out = block_sparse_attention(q, k, v, random_selection(TINY, density=0.4))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once; use backend='reference'"):
        dq.sum().backward()


def test_compiled_without_a_break() -> None:
    call = gradients.Call.of(TINY)

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(q, k, v, call.selection, return_lse=True)
        return 2 * out, lse

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for one, other in zip(call.gradients(compiled).values(), call.gradients(attend).values(), strict=True):
        assert torch.equal(one, other)
    # As models hand them over: what a compiler is told of strides holds for these too.
    args = (
        call.q.transpose(1, 2).contiguous().transpose(1, 2),
        call.k,
        call.v,
        call.selection.bits,
        [16, 16],
        7,
        [],
        0.2,
        None,
        None,
        None,
        None,
        None,
        call.k.shape[2],
        True,
        gather.__name__,
    )
    tests = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(torch.ops.seerattention.block_sparse_attention.default, args, test_utils=tests)


@pytest.mark.parametrize("block_size", [(64, 64), (16, 16)])
def test_gather_needs_no_dense_map(block_size: tuple[int, int]) -> None:
    shape = Shape(name="", heads=2, kv_heads=1, queries=2048, keys=2048, head_dim=64, block_size=block_size)
    q, k, v = (x.requires_grad_() for x in random_qkv(shape))
    selection = random_selection(shape, density=0.1)
    with LargestTensor() as largest:
        block_sparse_attention(q, k, v, selection, backend="gather").sum().backward()
    assert 0 < largest.bytes <= gather.WORK_BYTES


def test_kernels_on_gpus_have_a_backward() -> None:
    assert callable(triton.backward)
    assert callable(hopper.backward)
    full = BlockSelection.full(Rows.last(64, 64), (64, 64))
    q = torch.zeros(1, 1, 64, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="triton: it needs a GPU"):
        block_sparse_attention(q, q, q, full, backend="triton")
