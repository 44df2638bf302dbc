"""The compiled kernels of `select_decode_blocks`; tests/ops runs the same code in the interpreter."""

from functools import partial

import pytest
import torch

from seerattention.ops.cases.select_decode_blocks import CASES, LARGE, Case
from seerattention.ops.select_decode_blocks import BACKENDS, select_decode_blocks
from seerattention.policies import Threshold, TokenBudget, TopP
from seerattention.testing.selections import Certain, decode_arguments
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

BY_NAME = {case.name: case for case in CASES}
POLICIES = [TokenBudget(64), TokenBudget(96, sink_blocks=2, local_blocks=3), Threshold(0.04), TopP(0.7)]


def check(args, policy, backend):
    certain = Certain.of_tokens(policy=policy, **args)
    found = select_decode_blocks(policy=policy, **args, backend=backend)
    certain.check(found)
    again = select_decode_blocks(policy=policy, **args, backend=backend)
    assert torch.equal(found.bits, again.bits), "two runs differ"
    return certain.share


@pytest.mark.parametrize("backend", ["triton", "composed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chooses_as_the_reference(case, dtype, backend):
    args = decode_arguments(case, dtype, "cuda")
    shares = [check(args, policy, backend) for policy in POLICIES]
    if dtype == torch.float32:
        assert min(shares) > 0.9


@pytest.mark.parametrize(
    "policy", [TokenBudget(4096), TokenBudget(2048, sink_blocks=1), Threshold(2e-3), TopP(0.9)], ids=str
)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_the_sizes_that_are_benchmarked(case, policy):
    # Maxima of many summaries lie so close together that rounding to bfloat16 decides where a share ends.
    fine = case.gate.get("k_sub_block") == 1 and isinstance(policy, TopP)
    dtype = torch.float16 if fine else torch.bfloat16
    assert check(decode_arguments(case, dtype, "cuda"), policy, "triton") > 0.5


def test_auto_takes_it(monkeypatch):
    monkeypatch.setattr(BACKENDS["composed"], "run", None)
    select_decode_blocks(policy=TokenBudget(64), **decode_arguments(CASES[0], torch.bfloat16, "cuda"))


def captured(args, policy):
    """A call as a captured graph, and what it returned."""
    call = partial(select_decode_blocks, policy=policy, **args, backend="triton")
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bits = call().bits
    return call, graph, bits


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", ["ragged", "drafted", "sub-blocks", "each-token", "each-token-drafted"])
def test_a_captured_step_goes_on_while_everything_changes_in_place(name, policy):
    args = decode_arguments(BY_NAME[name], torch.bfloat16, "cuda")
    args["k_blocks"].normal_()
    call, graph, bits = captured(args, policy)
    for seed in range(1, 9):
        changed = [1 + (61 * seed + 97 * row) % args["num_keys"] for row in range(len(args["lengths"]))]
        args["lengths"].copy_(torch.tensor(changed, dtype=torch.int32))
        args["q"].normal_()
        graph.replay()
        assert torch.equal(bits, call().bits), f"a replay at lengths {changed} is not what a call gives"


def test_ten_thousand_steps_wait_for_nothing_and_keep_their_memory():
    case = Case(name="", keys=12288, batch=3, held=(100, 1, 2000))
    args = decode_arguments(case, torch.bfloat16, "cuda")
    args["k_blocks"].normal_()
    call, graph, bits = captured(args, TokenBudget(256))
    graph.replay()
    one = torch.tensor(1, device="cuda", dtype=torch.int32)
    before = torch.cuda.memory_allocated()
    with no_waiting():
        for _ in range(10_000):
            args["lengths"].add_(one)
            graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert args["lengths"].tolist() == [10_100, 10_001, 12_000]
    assert torch.equal(bits, call().bits)
