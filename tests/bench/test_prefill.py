"""What the prefill benchmark counts and checks, without timing anything."""

import pytest

from seerattention.bench.ceilings import l2_tflops
from seerattention.bench.peers import DENSE, dense
from seerattention.bench.plan import Plan
from seerattention.bench.prefill import causal_pairs, check_rows
from seerattention.hosts.transformers import new_gates
from seerattention.measure import bundled
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.block_sparse_attention.reference import token_mask
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing.inputs import random_qkv, random_selection


def shape(tokens, block=16, heads=4, kv_heads=2):
    return Shape(
        name="",
        heads=heads,
        kv_heads=kv_heads,
        queries=tokens,
        keys=tokens,
        head_dim=16,
        block_size=(block, block),
    )


def test_the_default_gate_is_what_a_model_gets():
    model = bundled.load_teacher()[0]
    kinds = {"masks": ("random",), "gates": ("default",), "peers": ()}
    sizes = {"heads": 6, "kv_heads": 2, "head_dim": 64, "dtype": "float32", "device": "cpu"}
    plan = Plan(tokens=(64,), densities=(0.1,), blocks=(64,), **kinds, **sizes)
    assert plan.gate("default", 64).config == new_gates(model).config


@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
def test_pairs_are_counted_exactly(tokens):
    sizes = shape(tokens)
    selection = random_selection(sizes, density=0.4)
    expected = int(token_mask(selection, 4, Rows.last(tokens, tokens)).sum())
    assert causal_pairs(selection, tokens) == expected


def test_sampled_rows_are_held_to_the_budget():
    sizes = shape(200)
    qkv, selection = random_qkv(sizes), random_selection(sizes, density=0.4)
    out = block_sparse_attention(*qkv, selection, backend="gather")
    check_rows(qkv, selection, out)
    for token in (3, 100, 199):
        wrong = out.clone()
        wrong[0, 1, token] *= 1.01
        with pytest.raises(AssertionError, match="exceeds the budget"):
            check_rows(qkv, selection, wrong)


def test_the_l2_line():
    # 64 queries share a read: 64 FLOP per byte of bf16 (docs/kernels.md).
    assert l2_tflops(6.25, 64, 2) == 400
    assert l2_tflops(6.25, 128, 2) == 800
    assert l2_tflops(6.25, 64, 4) == 200


def test_a_dense_kernel_that_cannot_run_says_so():
    qkv = random_qkv(shape(32))
    with pytest.raises(NotImplementedError, match="CUDNN_ATTENTION cannot run"):
        dense(DENSE["cudnn"], *qkv)
