"""The compiled kernel of `update_summaries`; tests/ops runs the same code in the interpreter."""

import pytest
import torch

from seerattention.gate import AttnGate, GateConfig
from seerattention.ops.cases.select_decode_blocks import CASES, LARGE, Case
from seerattention.ops.update_summaries import BACKENDS, update_summaries
from seerattention.testing.summaries import check_updates
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_check(case, dtype, backend):
    check_updates(BACKENDS[backend], case, dtype, "cuda")


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_the_sizes_that_are_benchmarked(case):
    check_updates(BACKENDS["triton"], case, torch.bfloat16, "cuda")


def test_ten_thousand_steps_wait_for_nothing_and_keep_their_memory():
    case = Case(name="", keys=12288, gate={"k_sub_block": 8})
    gate = AttnGate(GateConfig(**case.design)).to("cuda", torch.bfloat16)
    scorer, begins, steps = gate.per_token(), [100, 1, 2000], 10_000
    k = torch.randn(3, 2, 1, 32, device="cuda", dtype=torch.bfloat16)
    summaries = torch.zeros(3, 2, 1536, gate.config.dim, device="cuda", dtype=torch.bfloat16)
    tail = torch.zeros(3, 2, 16, 32, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor(begins, device="cuda", dtype=torch.int32)
    update_summaries(summaries.clone(), tail.clone(), k, scorer, lengths=lengths, backend="triton")
    history = torch.zeros(3, 2, case.keys, 32, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        k.add_(0.37).remainder_(5)
        lengths.add_(1)
        history.scatter_(2, (lengths - 1).long()[:, None, None, None].expand_as(k), k)
        update_summaries(summaries, tail, k, scorer, lengths=lengths, backend="triton")
    before = torch.cuda.memory_allocated()
    with no_waiting():
        for _ in range(steps):
            graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert lengths.tolist() == [begin + steps for begin in begins]
    whole = gate.compress(history, positions=torch.arange(case.keys, device="cuda"))
    for row, length in enumerate(lengths.tolist()):
        # From the first block that only steps have written.
        seen = slice((begins[row] // 16 + 1) * 2, length // 16 * 2)
        torch.testing.assert_close(summaries[row, :, seen], whole[row, :, seen], rtol=0.02, atol=0.02)
