"""The portable backends on a CUDA device: the CPU suite's cases, the error budget, NaN and memory."""

from functools import partial

import pytest
import torch

from seerattention.ops import block_sparse_attention as sparse
from seerattention.ops import pooled_attention as pooled
from seerattention.ops.cases.block_sparse_attention import CASES, OPTION_CASES, Case
from seerattention.ops.shapes import Shape
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.poison import poison
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

SMALL = [case for case in CASES if not case.large]
PORTABLE = ["flex", "gather", "reference"]
# FlexAttention needs head dimensions and blocks that are powers of two on a GPU.
PLAIN = ("below-block", "one-block", "block-plus-one", "thousand", "wide-128", "kv-selection")


def inputs(case, dtype):
    selection = random_selection(case, density=case.density, heads=case.selection_heads, device="cuda")
    return random_qkv(case, dtype=dtype, device="cuda"), selection


@pytest.mark.parametrize("backend", PORTABLE)
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


@pytest.mark.parametrize("backend", PORTABLE)
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
@pytest.mark.parametrize("pool", ["max", "mass"])
def test_pooled_attention_within_the_error_budget(tokens, block, dtype, pool):
    case = Shape(name="", heads=4, kv_heads=2, queries=tokens, keys=tokens, head_dim=64, block_size=block)
    qkv = random_qkv(case, dtype=dtype, device="cuda")
    run = partial(pooled.pooled_attention, block_size=block, pool=pool)
    for which in (0, 1):
        budget = Budget.of(lambda q, k, v, i=which: run(q, k, v, backend="reference")[i], *qkv)
        budget.check(run(*qkv, backend="chunked")[which])


def test_pooled_attention_needs_bounded_memory_at_32k_tokens():
    from seerattention.ops.pooled_attention import chunked

    q, k, v = (torch.randn(1, h, 32768, 64, device="cuda", dtype=torch.bfloat16) for h in (6, 2, 2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, target, _ = pooled.pooled_attention(q, k, v, (64, 64), backend="chunked")
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes - target.nbytes
    # Scores and their softmax, each within the budget, the mask, and fp32 copies of q, k and v.
    copies = 2 * (2 * q.nbytes + k.nbytes + v.nbytes) + target.nbytes
    assert extra <= 3 * chunked.CUDA_WORK_BYTES + copies


class TestTriton:
    """The compiled kernel; tests/ops runs the same code in the interpreter."""

    DTYPES = (torch.bfloat16, torch.float16, torch.float32)

    @staticmethod
    def run(case, dtype):
        qkv, selection = inputs(case, dtype)
        options = case.options("cuda", return_lse=True)
        return sparse.BACKENDS["triton"].run(*qkv, selection, options)

    @classmethod
    def budgets(cls, case, dtype):
        qkv, selection = inputs(case, dtype)
        options = case.options("cuda", return_lse=True)
        for which in (0, 1):
            yield Budget.of(
                lambda q, k, v, i=which: sparse.reference.run(q, k, v, selection, options)[i], *qkv
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", [*SMALL, *OPTION_CASES], ids=lambda case: case.name)
    def test_output_and_lse_twice(self, case, dtype):
        first, second = self.run(case, dtype), self.run(case, dtype)
        for one, other, budget in zip(first, second, self.budgets(case, dtype), strict=True):
            budget.check(one)
            assert torch.equal(one, other)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
    @pytest.mark.parametrize("block_q", [1, 32, 64, 128])
    @pytest.mark.parametrize("block_k", [16, 32, 64, 128])
    def test_head_dims_and_blocks(self, head_dim, block_q, block_k, dtype):
        case = Case(
            name="", heads=4, kv_heads=2, queries=9 if block_q == 1 else 300, keys=500,
            head_dim=head_dim, block_size=(block_q, block_k),
        )  # fmt: skip
        for one, budget in zip(self.run(case, dtype), self.budgets(case, dtype), strict=True):
            budget.check(one)

    @pytest.mark.parametrize("case", [c for c in SMALL if c.keys > c.queries], ids=lambda case: case.name)
    def test_unread_keys_and_values_are_never_read(self, case):
        (q, k, v), selection = inputs(case, torch.bfloat16)
        options = case.options()
        clean, _ = sparse.BACKENDS["triton"].run(q, k, v, selection, options)
        poisoned, _ = sparse.BACKENDS["triton"].run(q, *poison(k, v, selection), selection, options)
        assert not clean.isnan().any()
        assert torch.equal(clean, poisoned)

    @pytest.mark.parametrize("case", [SMALL[4], *OPTION_CASES], ids=lambda case: case.name)
    def test_compiled_without_a_break(self, case):
        (q, k, v), selection = inputs(case, torch.bfloat16)
        options = case.options("cuda")

        def call(q, k, v):
            out, lse = sparse.block_sparse_attention(
                q, k, v, selection, softcap=options.softcap, sinks=options.sinks, return_lse=True,
                rows=options.rows, backend="triton",
            )  # fmt: skip
            return 2 * out, lse

        for one, other in zip(torch.compile(call, fullgraph=True)(q, k, v), call(q, k, v), strict=True):
            assert torch.equal(one, other)

    def test_many_programs_take_many_rows(self):
        # More rows than programs, heads that share keys, and more blocks than a row's words hold at once.
        case = Case(name="", heads=8, kv_heads=2, queries=8192, keys=8192, head_dim=64, block_size=(32, 16))
        q, k, v = random_qkv(case, dtype=torch.bfloat16, device="cuda")
        selection = random_selection(case, density=0.02, device="cuda")
        out, _ = sparse.BACKENDS["triton"].run(q, k, v, selection, case.options())
        wide = (x.float() for x in (q, k, v))
        expected, _ = sparse.BACKENDS["gather"].run(*wide, selection, case.options())
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)

    def test_nothing_waits_for_the_device(self):
        case = SMALL[4]
        self.run(case, torch.bfloat16)
        qkv, selection = inputs(case, torch.bfloat16)
        with no_waiting():
            sparse.BACKENDS["triton"].run(*qkv, selection, case.options())
