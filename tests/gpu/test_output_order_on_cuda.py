"""The output of `block_sparse_attention` lies in memory as q does; models then read it without a copy."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seerattention import block_sparse_attention, pooled_attention
from seerattention.ops.block_sparse_attention import BACKENDS
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.testing import gradients

pytestmark = pytest.mark.gpu

PLAIN = Case(name="plain", heads=8, kv_heads=2, queries=333, keys=1000, head_dim=128, density=0.2)
CASES = [
    PLAIN,
    replace(PLAIN, name="batch", batch=3, queries=200, keys=420, sinks=True),
    replace(PLAIN, name="heads-share-lists", selection_heads=2),
    replace(PLAIN, name="blocks-128", head_dim=64, block_size=(128, 128)),
    replace(PLAIN, name="one-token", queries=1),
]


def tokens_first(q: Tensor) -> Tensor:
    return q.transpose(1, 2).contiguous().transpose(1, 2)


def of_fused(q: Tensor) -> Tensor:
    rest = torch.full_like(q[:, :4], torch.nan)
    return tokens_first(torch.cat((q, rest, rest), 1))[:, : q.shape[1]]


def batch_inside(q: Tensor) -> Tensor:
    return q.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


#: Views of equal numbers, and the order of batch, heads and tokens in memory.
VIEWS = {tokens_first: (0, 2, 1), of_fused: (0, 2, 1), batch_inside: (2, 0, 1), torch.clone: (0, 1, 2)}


def call_of(case: Case, backend: str) -> gradients.Call:
    call = gradients.Call.of(case, torch.bfloat16, "cuda")
    reasons = BACKENDS[backend].unsupported(call.q, call.k, call.v, call.selection, call.options)
    if reasons:
        assert backend == "hopper", reasons
        pytest.skip("; ".join(reasons))
    return call


def attend(call: gradients.Call, q: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return output and lse where no gradient is asked for."""
    return gradients.by_name(backend)(q, call.k, call.v, call.selection, call.options)


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs(case, view, backend):
    call = call_of(case, backend)
    expected, expected_lse = attend(call, call.q, backend)
    out, lse = attend(call, view(call.q), backend)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert out.permute(*VIEWS[view], 3).is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case, view, backend):
    call = call_of(case, backend)
    expected = call.gradients(gradients.by_name(backend))
    # Models give gradients in the order in which they read outputs.
    viewed = replace(call, q=view(call.q), grad=tokens_first(call.grad))
    found = viewed.gradients(gradients.by_name(backend))
    assert found["q"].stride() == torch.empty_like(viewed.q).stride()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_a_compiler_is_told_the_strides(view, backend):
    call = call_of(PLAIN, backend)
    q = view(call.q)
    expected = torch.empty_like(q).stride()
    op = torch.ops.seerattention.block_sparse_attention.default
    module = BACKENDS[backend]
    out, _ = module.run(q, call.k, call.v, call.selection, call.options)
    assert out.stride() == expected
    block_size = list(call.selection.block_size)
    rest = call.options.scale, None, None, None, None, None, PLAIN.keys, True, module.__name__
    args = q, call.k, call.v, call.selection.bits, block_size, call.selection.shape[3], [], *rest
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    assert op(*args)[0].stride() == expected


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_compiled_without_a_break(view, backend):
    call = call_of(PLAIN, backend)

    def joined(*args):
        out, lse = gradients.by_name(backend)(*args)
        return out.transpose(1, 2).flatten(2), lse

    viewed = replace(call, q=view(call.q), grad=call.grad.transpose(1, 2).flatten(2))
    expected = viewed.gradients(joined)
    for name, x in viewed.gradients(torch.compile(joined, fullgraph=True)).items():
        assert torch.equal(x, expected[name]), name
    compiled = torch.compile(lambda q: attend(call, q, backend)[0] * 2, fullgraph=True)
    assert torch.equal(compiled(viewed.q), attend(call, call.q, backend)[0] * 2)


@pytest.mark.parametrize("view", [tokens_first, of_fused], ids=lambda view: view.__name__)
def test_heads_are_joined_without_a_copy(view):
    call = call_of(PLAIN, "triton")
    out = block_sparse_attention(view(call.q), call.k, call.v, call.selection)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_the_output_beside_a_map(view):
    call = gradients.Call.of(PLAIN, torch.bfloat16, "cuda")
    expected = pooled_attention(call.q, call.k, call.v, (64, 64))
    found = pooled_attention(view(call.q), call.k, call.v, (64, 64))
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.target, expected.target)
    assert found.out.permute(*VIEWS[view], 3).is_contiguous()
