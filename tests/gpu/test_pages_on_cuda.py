"""Prefill over keys and values in pages on a CUDA device; tests/ops runs the same checks on a CPU."""

import pytest
import torch

from seerattention.ops.block_sparse_attention import BACKENDS, block_sparse_attention
from seerattention.ops.block_sparse_decode import block_sparse_decode
from seerattention.ops.cases.block_sparse_attention import PAGED_CASES, Case
from seerattention.selection import BlockSelection
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.paged import check_paged, in_pages, paged_inputs
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

BY_NAME = {case.name: case for case in PAGED_CASES}


def call(case, dtype=torch.bfloat16):
    q, k, v, selection, options = paged_inputs(case, dtype, "cuda")
    return q, in_pages(k, case), in_pages(v, case), selection, options


@pytest.mark.parametrize("backend", ["reference", "gather", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_pages(backend, dtype, case):
    if (backend, case.name) == ("triton", "odd-pages"):
        pytest.skip("a tile of keys cannot lie in several pages")
    check_paged(BACKENDS[backend], case, dtype, "cuda")


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("block", [(32, 64), (128, 128)])
@pytest.mark.parametrize("page", [16, 64, 128, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_dims_and_blocks(head_dim, block, page, dtype):
    case = Case(name="", queries=300, keys=700, head_dim=head_dim, batch=2, block_size=block, page=page)
    check_paged(BACKENDS["triton"], case, dtype, "cuda")


@pytest.mark.parametrize("name", ["pages", "packed-pages"])
def test_auto_takes_triton(monkeypatch, name):
    monkeypatch.setattr(BACKENDS["gather"], "run", None)
    q, k, v, selection, options = call(BY_NAME[name])
    out = block_sparse_attention(q, k, v, selection, rows=options.rows, pages=options.pages)
    assert torch.equal(out, BACKENDS["triton"].run(q, k, v, selection, options)[0])


@pytest.mark.parametrize("name", ["pages", "packed-pages"])
def test_compiles_as_one_graph(name):
    q, k, v, selection, options = call(BY_NAME[name])

    def attend(q, k, v, pages):
        out, lse = block_sparse_attention(q, k, v, selection, rows=options.rows, pages=pages, return_lse=True)
        return 2 * out, lse

    given = q, k, v, options.pages
    for one, other in zip(torch.compile(attend, fullgraph=True)(*given), attend(*given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["pages", "small-pages", "packed-pages"])
def test_nothing_waits_for_the_device(name):
    given = call(BY_NAME[name])
    BACKENDS["triton"].run(*given)
    with no_waiting():
        BACKENDS["triton"].run(*given)


def test_pages_change_in_place_in_a_graph():
    q, k, v, selection, options = call(BY_NAME["pages"])
    run = BACKENDS["triton"].run
    run(q, k, v, selection, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = run(q, k, v, selection, options)
    for _ in range(3):
        options.pages.copy_(options.pages.roll(1, 0))
        graph.replay()
        assert torch.equal(out, run(q, k, v, selection, options)[0])


@pytest.mark.parametrize("backend", ["gather", "triton"])
def test_a_cache_of_more_numbers_than_32_bits_count(backend):
    page = 64
    k, v = torch.zeros(36000, 4, page, 256, dtype=torch.bfloat16, device="cuda").split(128, -1)
    assert k.stride(0) * len(k) > 2**31
    case = Case(name="", heads=8, kv_heads=4, queries=70, keys=300, head_dim=128)
    q, keys, values = random_qkv(case, dtype=torch.bfloat16, device="cuda")
    selection, options = random_selection(case, density=0.5, device="cuda"), case.options("cuda")
    pages = torch.tensor([[35999, 5, 35000, 34000, 33333]], dtype=torch.int32, device="cuda")
    for i, number in enumerate(pages[0].tolist()):
        here = slice(i * page, min((i + 1) * page, 300))
        k[number, :, : here.stop - here.start] = keys[0, :, here]
        v[number, :, : here.stop - here.start] = values[0, :, here]
    out = block_sparse_attention(q, k, v, selection, rows=options.rows, pages=pages, backend=backend)
    expected = block_sparse_attention(q, keys, values, selection, backend=backend)
    torch.testing.assert_close(out, expected)
    last = BlockSelection.from_mask(torch.ones(1, 1, 1, 5, dtype=torch.bool, device="cuda"), (1, page))
    length = torch.tensor([300], dtype=torch.int32, device="cuda")
    step = block_sparse_decode(q[:, :, -1:], k, v, last, lengths=length, pages=pages, backend=backend)
    alone = block_sparse_decode(q[:, :, -1:], keys, values, last, backend=backend)
    torch.testing.assert_close(step, alone)
