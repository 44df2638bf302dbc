from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention import BACKENDS, reference
from seerattention.ops.cases.block_sparse_attention import CASES, OPTION_CASES, Case
from seerattention.ops.options import Options
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing import conformance
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv, random_selection

SMALL = [case for case in CASES if not case.large]
#: Those that run on a CPU without a compiler or an interpreter.
EAGER = {name: BACKENDS[name] for name in ("gather", "reference")}
by_backend = pytest.mark.parametrize("backend", EAGER.values(), ids=EAGER)
by_case = pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.head_dim for case in SMALL} >= {64, 80, 96, 128, 256}


@by_backend
@by_case
def test_conforms(backend: ModuleType, case: Case) -> None:
    conformance.check_attention(backend, case)


@by_backend
@by_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: ModuleType, case: Case, dtype: torch.dtype) -> None:
    conformance.attention_matches_reference(backend, case, dtype)
    conformance.attention_full_is_dense(backend, case, dtype)
    if case.queries < case.keys:
        conformance.attention_ignores_unread(backend, case, dtype)


@by_backend
def test_full_selection_is_sdpa(backend: ModuleType) -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=777, keys=777, head_dim=64, batch=2)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
        )

    q, k, v = random_qkv(shape)
    full = BlockSelection.full(Rows.last(777, 777), (64, 64))
    Budget.of(dense, q, k, v).check(backend.run(q, k, v, full, Options.of(q, k))[0])


@by_backend
def test_strides_do_not_matter(backend: ModuleType) -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=200, keys=200, head_dim=64)
    q, k, v = random_qkv(shape)
    selection = random_selection(shape, density=0.3)
    # As models hand them over: [B, T, H, D] transposed, v a slice of something wider.
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    wide = torch.cat([v, v], -1)[..., :64]
    options = Options.of(q, k)
    out, _ = backend.run(q, k, v, selection, options)
    assert torch.equal(backend.run(*strided, wide, selection, options)[0], out)


@by_backend
def test_infinite_unread_keys(backend: ModuleType) -> None:
    case = next(case for case in SMALL if case.name == "later-chunk")
    q, k, v = random_qkv(case)
    selection = random_selection(case, density=0.3, heads=1)
    unread = ~selection.to_mask()[0, 0].any(0).repeat_interleave(64)[: case.keys]
    assert unread.any()
    options = Options.of(q, k)
    clean, _ = backend.run(q, k, v, selection, options)
    k[:, :, unread], v[:, :, unread] = torch.inf, -torch.inf
    assert torch.equal(backend.run(q, k, v, selection, options)[0], clean)


@pytest.mark.parametrize("queries", [150, 40])
def test_reference_gradients(queries: int) -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=queries, keys=150, head_dim=16, block_size=(32, 32))
    selection = random_selection(shape, density=0.4)
    blocks = selection.to_mask().repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, :queries, :150]
    query = torch.arange(150 - queries, 150)[:, None]
    hidden = ~blocks | (torch.arange(150) > query)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) / 4
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, selection, backend="reference")

    def gradient(attention: Callable[[Tensor, Tensor, Tensor], Tensor], which: int) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            leaves = [x.detach().requires_grad_() for x in inputs]
            weight = torch.linspace(-1, 1, 16, dtype=inputs[0].dtype)
            return torch.autograd.grad((attention(*leaves) * weight).sum(), leaves)[which]

        return run

    inputs = random_qkv(shape)
    for which in range(3):
        Budget.of(gradient(plain, which), *inputs).check(gradient(sparse, which)(*inputs))


def test_scale_of_zero_is_a_scale() -> None:
    case = SMALL[3]
    q, k, v = random_qkv(case)
    full = BlockSelection.full(Rows.last(65, 65), (64, 64))
    out = block_sparse_attention(q, k, v, full, scale=0.0)
    mean = v.cumsum(2) / torch.arange(1, 66)[:, None]
    torch.testing.assert_close(out, mean.repeat_interleave(2, 1))


@pytest.mark.parametrize("backend", [*EAGER, "auto"])
def test_inputs_are_left_alone(backend: str) -> None:
    case = SMALL[4]
    inputs = random_qkv(case)
    before = [x.clone() for x in inputs]
    block_sparse_attention(*inputs, random_selection(case, density=0.3), backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@by_backend
@pytest.mark.parametrize("case", OPTION_CASES, ids=[case.name for case in OPTION_CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(backend: ModuleType, case: Case, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(case, dtype=dtype)
    selection = random_selection(case, density=0.3, heads=case.selection_heads)
    if reasons := backend.unsupported(q, k, v, selection, case.options()):
        assert case.lengths, reasons
        return
    conformance.attention_matches_reference(backend, case, dtype)
    conformance.attention_lse_matches_reference(backend, case, dtype)


def test_reference_options_by_the_formula() -> None:
    case = next(c for c in OPTION_CASES if c.name == "softcap-and-sinks")
    q, k, v = (x.double() for x in random_qkv(case))
    full = BlockSelection.full(Rows.last(90, 90), (64, 64))
    options = case.options(return_lse=True)
    out, lse = reference.run(q, k, v, full, options)
    assert options.sinks is not None
    assert lse is not None
    for head in range(case.heads):
        for i in (0, 40, 89):
            scores = (k[0, head, : i + 1] @ q[0, head, i]) * options.scale
            weights = (30 * torch.tanh(scores / 30)).exp()
            total = weights.sum() + options.sinks[head].double().exp()
            torch.testing.assert_close(out[0, head, i], weights @ v[0, head, : i + 1] / total)
            torch.testing.assert_close(lse[0, head, i], total.log())


def test_packed_sequences_are_computed_one_by_one() -> None:
    case = next(c for c in OPTION_CASES if c.name == "packed")
    q, k, v = random_qkv(case)
    selection = random_selection(case, density=0.3)
    out = block_sparse_attention(q, k, v, selection, rows=case.rows(), backend="reference")
    start_q = start_k = row = 0
    for queries, keys in case.lengths:
        end_q, end_k, rows = start_q + queries, start_k + keys, -(-queries // 64)
        if queries:
            mask = selection.to_mask()[:, :, row : row + rows, : -(-keys // 64)]
            one_q, one_k, one_v = q[:, :, start_q:end_q], k[:, :, start_k:end_k], v[:, :, start_k:end_k]
            chosen = BlockSelection.from_mask(mask, (64, 64))
            torch.testing.assert_close(
                out[:, :, start_q:end_q], block_sparse_attention(one_q, one_k, one_v, chosen)
            )
        start_q, start_k, row = end_q, end_k, row + rows


@pytest.mark.parametrize("backend", EAGER)
def test_a_shard_of_a_prompt_sees_no_later_keys(backend: str) -> None:
    case = next(case for case in SMALL if case.name == "later-chunk")
    q, k, v = random_qkv(case)
    selection = random_selection(case, density=0.3)
    expected = block_sparse_attention(q, k, v, selection, backend=backend)
    nothing = torch.full((1, 2, 100, 64), torch.nan)
    k, v = torch.cat([k, nothing], 2), torch.cat([v, nothing], 2)
    rows = Rows.at(case.keys - case.queries, case.queries)
    assert torch.equal(block_sparse_attention(q, k, v, selection, rows=rows, backend=backend), expected)
