"""Ops compute in the dtypes of what they are given: autocast changes nothing that any backend returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention import AttnGate, BlockSelection, GateConfig, baselines
from seerattention.ops import block_sparse_attention as attention_op
from seerattention.ops import pooled_attention as pooled_op
from seerattention.ops import score_blocks as score_op
from seerattention.ops import select_blocks as select_op
from seerattention.ops import summarise_blocks as summarise_op
from seerattention.ops.attention_scores import attention_scores, block_mass
from seerattention.ops.dense_attention import dense_attention
from seerattention.ops.shapes import Shape
from seerattention.policies import parse
from seerattention.rows import Rows
from seerattention.testing.inputs import random_qkv

BLOCK = (16, 16)
SHAPE = Shape(name="", heads=4, kv_heads=2, queries=56, keys=56, head_dim=16, block_size=BLOCK)
SELECTION = BlockSelection.full(Rows.last(56, 56), BLOCK)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def attention(backend: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    sinks = torch.linspace(-1, 1, 4)
    call = partial(attention_op.block_sparse_attention, backend=backend, sinks=sinks, **options)
    return list(call(q, k, v, SELECTION, return_lse=True))


def pooled(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Any]:
    return list(pooled_op.pooled_attention(q, k, v, BLOCK, return_lse=True, backend=backend))


def scored(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [score_op.score_blocks(q, k, (4, 4), backend=backend)]


def summarised(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, 4 * 32 * 16).view(4, 32, 16).to(q.dtype)
    norm = torch.linspace(0.5, 1, 16).to(q.dtype)
    options: dict[str, Any] = {"weight": weight, "norm": norm, "backend": backend}
    return [summarise_op.summarise_blocks(k, 16, ("max", "avg"), **options)]


def selected(backend: str, q: Tensor, k: Tensor, v: Tensor, name: str = "") -> list[Tensor]:
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16)).to(q.dtype)
    scorer: Any = baselines.create(name) if name else gate
    positions = torch.arange(56)
    keys, policy = scorer.compress(k, positions=positions), parse("top_k:0.5")
    return [select_op.select_blocks(q, keys, scorer, policy, backend=backend).bits]


OPS: dict[str, tuple[Any, Callable[..., list[Any]]]] = {
    "attention": (attention_op, attention),
    "pooled": (pooled_op, pooled),
    "score": (score_op, scored),
    "summarise": (summarise_op, summarised),
    "select": (select_op, selected),
}
# They run on a GPU, or are compiled for seconds (`test_flex.py`, `test_native.py`).
ELSEWHERE = ("hopper", "triton", "flex", "native")
CALLS = {
    f"{name}-{backend}": partial(call, backend)
    for name, (op, call) in OPS.items()
    for backend in (*op.BACKENDS, "auto")
    if backend not in ELSEWHERE
} | {
    "dense": lambda q, k, v: [dense_attention(q, k, v, scale=0.3)],
    "dense with a softcap": lambda q, k, v: [dense_attention(q, k, v, scale=0.3, softcap=2.0)],
    "scores": lambda q, k, v: [attention_scores(q, k, torch.arange(56), scale=0.3)],
    "mass": lambda q, k, v: [block_mass(q, k, BLOCK, scale=0.3)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_autocast_changes_nothing(call: Callable[..., list[Any]], dtype: torch.dtype) -> None:
    inputs = random_qkv(SHAPE, dtype=dtype)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = call(*inputs)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            actual = call(*inputs)
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert all(torch.equal(*both) for both in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", baselines.names())
def test_nor_what_baselines_choose(name: str) -> None:
    inputs = random_qkv(SHAPE)
    expected = selected("auto", *inputs, name=name)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selected("auto", *inputs, name=name)[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_nor_the_gradient_of_a_backend(dtype: torch.dtype, backward_inside: bool) -> None:
    gradients = []
    for enabled in (False, True):
        inputs = [x.requires_grad_() for x in random_qkv(SHAPE, dtype=dtype)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attention("gather", *inputs)[0]
            total = out.float().sum()
            if backward_inside:
                total.backward()
        if not backward_inside:
            total.backward()
        gradients.append([x.grad for x in inputs])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gates_learn_in_the_precision_of_autocast_and_score_in_their_own(qk_norm: bool) -> None:
    q, k, _ = random_qkv(SHAPE)
    gate = AttnGate(GateConfig(4, 2, 16, block_size=16, qk_norm=qk_norm))
    with torch.no_grad():
        expected = gate(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(gate(q, k), expected)
        positions = torch.arange(56)
        assert gate.compress(k, positions=positions).dtype == torch.bfloat16
        # No product of 64 bits is rounded to 16.
        assert gate.double().compress(k.double(), positions=positions).dtype == torch.float64
