"""The portable backends on a CUDA device: the CPU suite's cases, the error budget, NaN and memory."""

import pytest
import torch

from seerattention.ops import block_sparse_attention as sparse
from seerattention.ops import pooled_attention as pooled
from seerattention.ops._shapes import Shape
from seerattention.ops.block_sparse_attention._cases import CASES
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.poison import poison

pytestmark = pytest.mark.gpu

SMALL = [case for case in CASES if not case.large]
# FlexAttention needs head dimensions and blocks that are powers of two on a GPU.
PLAIN = ("below-block", "one-block", "block-plus-one", "thousand", "wide-128", "kv-selection")


def inputs(case, dtype):
    selection = random_selection(case, density=case.density, heads=case.selection_heads, device="cuda")
    return random_qkv(case, dtype=dtype, device="cuda"), selection


@pytest.mark.parametrize("backend", sorted(sparse.BACKENDS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_output_within_the_error_budget(backend, case, dtype):
    if backend == "flex" and case.name not in PLAIN:
        case = next(c for c in SMALL if c.name == "thousand")
    qkv, selection = inputs(case, dtype)
    budget = Budget.of(
        lambda q, k, v: sparse.block_sparse_attention(q, k, v, selection, backend="reference"), *qkv
    )
    budget.check(sparse.block_sparse_attention(*qkv, selection, backend=backend))


@pytest.mark.parametrize("backend", sorted(sparse.BACKENDS))
def test_unselected_keys_and_values_are_never_read(backend):
    case = Shape(name="", heads=2, kv_heads=2, queries=128, keys=1024, head_dim=64)
    q, k, v = random_qkv(case, dtype=torch.bfloat16, device="cuda")
    selection = random_selection(case, density=0.3, device="cuda")
    before = sparse.block_sparse_attention(q, k, v, selection, backend=backend)
    poisoned = poison(k, v, selection)
    assert bool(poisoned[0].isnan().any()), "every block is read; nothing would be tested"
    assert torch.equal(before, sparse.block_sparse_attention(q, *poisoned, selection, backend=backend))


@pytest.mark.parametrize("tokens", [65, 1000])
@pytest.mark.parametrize("block", [(64, 64), (32, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pooled_attention_within_the_error_budget(tokens, block, dtype):
    case = Shape(name="", heads=4, kv_heads=2, queries=tokens, keys=tokens, head_dim=64, block_size=block)
    qkv = random_qkv(case, dtype=dtype, device="cuda")
    for which in (0, 1):
        budget = Budget.of(
            lambda q, k, v, i=which: pooled.pooled_attention(q, k, v, block, backend="reference")[i], *qkv
        )
        budget.check(pooled.pooled_attention(*qkv, block)[which])


def test_pooled_attention_needs_bounded_memory_at_32k_tokens():
    from seerattention.ops.pooled_attention import chunked

    q, k, v = (torch.randn(1, h, 32768, 64, device="cuda", dtype=torch.bfloat16) for h in (6, 2, 2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, target = pooled.pooled_attention(q, k, v, (64, 64))
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes - target.nbytes
    # Scores and their softmax, each within the budget, the mask, and fp32 copies of q, k and v.
    copies = 2 * (2 * q.nbytes + k.nbytes + v.nbytes) + target.nbytes
    assert extra <= 3 * chunked.CUDA_WORK_BYTES + copies
