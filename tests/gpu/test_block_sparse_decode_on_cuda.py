"""The compiled kernels of `block_sparse_decode`; tests/ops runs the same code in the interpreter."""

from dataclasses import replace

import pytest
import torch

from seerattention.ops.block_sparse_decode import BACKENDS, block_sparse_decode, triton
from seerattention.ops.cases.block_sparse_decode import CASES
from seerattention.selection import BlockSelection
from seerattention.testing.decoding import check_decode, decode_inputs, decode_selection
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

SMALL = [case for case in CASES if not case.large]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_check(backend, dtype, case):
    check_decode(BACKENDS[backend], case, dtype, "cuda")


@pytest.mark.parametrize("splits", [1, 2, 64])
@pytest.mark.parametrize("name", ["one-token", "wide-pages", "empty"])
def test_any_number_of_splits(monkeypatch, name, splits):
    monkeypatch.setattr(triton, "splits_of", lambda *shape: splits)
    check_decode(triton, BY_NAME[name], torch.bfloat16, "cuda")


def test_the_size_that_is_benchmarked():
    check_decode(triton, BY_NAME["llama-8b-32k"], torch.bfloat16, "cuda")


def test_auto_takes_it(monkeypatch):
    monkeypatch.setattr(BACKENDS["gather"], "run", None)
    q, k, v, selection, _ = decode_inputs(BY_NAME["drafted"], torch.bfloat16, "cuda")
    block_sparse_decode(q, k, v, selection)


@pytest.mark.parametrize("name", ["ragged", "wide-pages"])
def test_compiles_as_one_graph(name):
    q, k, v, selection, options = decode_inputs(BY_NAME[name], torch.bfloat16, "cuda")

    def call(q):
        out, lse = block_sparse_decode(
            q, k, v, selection, lengths=options.lengths, pages=options.pages, return_lse=True
        )
        return 2 * out, lse

    for one, other in zip(torch.compile(call, fullgraph=True)(q), call(q), strict=True):
        assert torch.equal(one, other)


def step_of(case):
    """A call whose lengths, pages, selection and queries change in place, captured, and what it returned."""
    q, k, v, selection, options = decode_inputs(case, torch.bfloat16, "cuda")

    def call():
        return block_sparse_decode(q, k, v, selection, lengths=options.lengths, pages=options.pages)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return q, selection, options, call, graph, out


@pytest.mark.parametrize("name", ["ragged", "paged", "wide-pages"])
def test_a_captured_step_goes_on_while_everything_changes_in_place(name):
    case = BY_NAME[name]
    q, selection, options, call, graph, out = step_of(case)
    for seed in range(1, 9):
        held = tuple(1 + (h + 61 * seed) % case.keys for h in case.held)
        changed = replace(case, held=held)
        options.lengths.copy_(torch.tensor(held, dtype=torch.int32))
        selection.bits.copy_(decode_selection(changed, "cuda", seed).bits)
        if options.pages is not None:
            options.pages.copy_(options.pages.roll(1, 0))
        q.normal_()
        graph.replay()
        assert torch.equal(out, call()), f"a replay at lengths {held} is not what a call gives"


def test_ten_thousand_steps_wait_for_nothing_and_keep_their_memory():
    case = replace(BY_NAME["ragged"], keys=12288, held=(100, 1, 2000))
    _, selection, options, call, graph, out = step_of(case)
    one = torch.tensor(1, device="cuda", dtype=torch.int32)
    full = BlockSelection.from_mask(torch.ones_like(selection.to_mask()), selection.block_size)
    selection.bits.copy_(full.bits)
    graph.replay()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        for _ in range(10_000):
            options.lengths.add_(one)
            graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert options.lengths.tolist() == [10_100, 10_001, 12_000]
    assert torch.equal(out, call())
