"""Scores of block pairs and their gradients on a CUDA device: exactness, precision, memory, repetition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seerattention import AttnGate, GateConfig
from seerattention.ops import score_blocks as score_op
from seerattention.ops import summarise_blocks as summarise_op
from seerattention.ops.cases.score_blocks import CASES, Case
from seerattention.ops.score_blocks import score_blocks
from seerattention.testing.budget import Budget
from seerattention.testing.packed import check_packed_scores
from seerattention.testing.waiting import no_waiting
from seerattention.train import layer, objectives
from seerattention.train.target import decode_rows, decode_target

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def sized(name: str, queries: int, keys: int | None = None, **options: object) -> Case:
    given = {"heads": 4, "kv_heads": 2, "dim": 128, "sub_blocks": (8, 8)} | options
    return Case(name=name, queries=queries, keys=keys or queries, **given)  # type: ignore[arg-type]


MIDDLING = [
    sized("eight", 2048),
    sized("eight-short-end", 2043),
    sized("eight-64", 1525, dim=64, heads=8, kv_heads=1),
    sized("uneven", 1000, 1999, sub_blocks=(4, 8)),
    sized("four", 1022, sub_blocks=(4, 4), heads=3, kv_heads=3),
    sized("no-sub-blocks", 333, sub_blocks=(1, 1), batch=2),
    sized("sixteen", 2999, sub_blocks=(16, 16)),
    sized("whole-rows", 300, 2397, sub_blocks=(1, 8), dim=64),
    sized("later-rows", 500, 1490),
    sized("every-pair", 500, 1490, causal=False),
    sized("wide", 600, dim=256),
]
#: What is special about a call has nothing to do with its dtype: every case in bf16, some in the others.
SPECIAL = ("one-summary", "one-short-block", "more-than-a-byte", "not-a-power-of-two")
CALLS = [(c, torch.bfloat16) for c in MIDDLING + [c for c in CASES if c.name in SPECIAL]]
CALLS += [
    (c, d) for c in MIDDLING if c.name in ("eight-64", "uneven", "sixteen", "later-rows") for d in DTYPES[1:]
]
by_call = pytest.mark.parametrize(("case", "dtype"), CALLS, ids=[f"{c.name}-{d}" for c, d in CALLS])


def run(
    case: Case, backend: str, q: Tensor, k: Tensor, gradient: Tensor, *, shares: bool = False
) -> tuple[Tensor, ...]:
    q, k = (x.detach().requires_grad_() for x in (q, k))
    options = {"scale": 0.5, "shares": shares, "backend": backend} | case.geometry
    scores = score_blocks(q, k, case.sub_blocks, **options)
    return scores.detach(), *torch.autograd.grad(scores, (q, k), gradient.to(scores.dtype))


def case_sizes(case: Case, q: Tensor, k: Tensor) -> float:
    """The largest score that there would be if all products had one sign."""
    return float(
        run(case, "reference", q.double().abs(), k.double().abs(), torch.ones(case.blocks).cuda())[0].max()
    )


@by_call
def test_exact_products_give_exact_results(case: Case, dtype: torch.dtype) -> None:
    """Ties included; sums of whole numbers are exact until a gradient is rounded to its dtype."""
    given = case.whole(dtype, "cuda")
    for mine, wanted in zip(run(case, "triton", *given), run(case, "reference", *given), strict=True):
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["eight-64", "uneven", "four", "later-rows", "every-pair", "whole-rows"])
def test_shares_within_the_error_budget(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices, each computed again in the backward pass; of whole numbers, so that equals are equal."""
    monkeypatch.setattr(score_op.BACKENDS["triton"], "SLICE_BYTES", 2**20)
    case = next(c for c in MIDDLING if c.name == name)
    q, k, gradient = case.whole(dtype, "cuda")
    for place, mine in enumerate(run(case, "triton", q, k, gradient, shares=True)):

        def reference(q: Tensor, k: Tensor, i: int = place) -> Tensor:
            return run(case, "reference", q, k, gradient, shares=True)[i]

        Budget.of(reference, q, k).check(mine)


@by_call
def test_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    q, k, gradient = case.normal(dtype, "cuda")
    assert (gradient != 0).float().mean() > 0.9
    scores, *gradients = run(case, "triton", q, k, gradient)
    exact = run(case, "reference", q.double(), k.double(), gradient)[0]
    # Tensor cores cut sums off where torch rounds them: E additions and the scaling, each less than eps of
    # the sum of the products' sizes.
    sizes = case_sizes(case, q, k)
    Budget(exact, torch.float32, (case.dim + 2) * torch.finfo(torch.float32).eps * sizes).check(scores)
    for place, mine in enumerate(gradients, 1):

        def reference(q: Tensor, k: Tensor, i: int = place) -> Tensor:
            return run(case, "reference", q, k, gradient)[i]

        Budget.of(reference, q, k).check(mine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_packed_sequences_are_those_alone(backend: str, dtype: torch.dtype) -> None:
    check_packed_scores(backend, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_the_same_bits(dtype: torch.dtype) -> None:
    case = MIDDLING[1]
    given = case.normal(dtype, "cuda")
    for a, b in zip(run(case, "triton", *given), run(case, "triton", *given), strict=True):
        assert torch.equal(a, b)


def test_gradients_below_the_range_of_fp16() -> None:
    case = MIDDLING[0]
    q, k, gradient = case.normal(torch.float16, "cuda")
    gradient *= 2.0**-10
    # The same without small numbers.
    large = run(case, "triton", q.float(), k.float(), gradient)
    for mine, wanted in zip(run(case, "triton", q, k, gradient)[1:], large[1:], strict=True):
        assert mine.any()
        assert (mine.float() - wanted).abs().max() <= 2.0**-24 + 2.0**-10 * wanted.abs().max()


def test_memory_is_that_of_the_results() -> None:
    """At 64k tokens: scores, a byte per score, and the gradients; beside them nothing but small change."""
    case = next(c for c in CASES if c.name == "llama-8b-64k")
    q = torch.randn(1, case.heads, case.queries, case.dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, case.kv_heads, case.keys, case.dim, device="cuda", dtype=torch.bfloat16)
    q, k = q.requires_grad_(), k.requires_grad_()
    gradient = torch.ones(case.blocks, device="cuda")
    torch.autograd.grad(score_blocks(q[:, :, :512], k[:, :, :512], case.sub_blocks).sum(), (q, k))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = score_blocks(q, k, case.sub_blocks, **case.geometry)
    found = torch.autograd.grad(scores, (q, k), gradient)
    extra = torch.cuda.max_memory_allocated() - before
    assert all(x.any() for x in found)
    results = 5 * gradient.numel() + q.numel() * 2 + k.numel() * 2
    assert extra <= results + 2**20


@pytest.mark.parametrize("settings", [{}, {"per_kv_head": True}, {"q_sub_block": None, "k_sub_block": None}])
def test_a_gate_learns_by_the_kernels(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the loss, in bfloat16: as far from fp64's as that of the references, at most twice."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 4000, 64, device="cuda").bfloat16() for heads in (8, 2))
    gate = AttnGate(GateConfig(8, 2, 64, **settings)).cuda()
    target = torch.rand(1, 2 if settings.get("per_kv_head") else 8, 63, 63, device="cuda").tril()
    target /= target.sum(-1, keepdim=True)
    loss = objectives.create("kl")

    def learn(q: Tensor, k: Tensor) -> Tensor:
        gate.zero_grad()
        layer.learn(gate, q, k, {"prefill": target}, loss, 1.0, 0.1)
        return torch.cat([p.grad.flatten().double() for p in gate.parameters() if p.grad is not None])

    with monkeypatch.context() as patch:
        for op in (score_op, summarise_op):
            patch.setattr(op.BACKENDS["reference"], "run", None)
        mine = learn(q, k)
    for op in (score_op, summarise_op):
        monkeypatch.setattr(op, "ORDER", ("reference",))
    plain = learn(q, k)
    gate.double()
    gold = learn(q.double(), k.double())
    assert (mine - gold).norm() <= 2 * (plain - gold).norm()


@pytest.mark.parametrize("shares", [False, True])
def test_learning_does_not_wait_for_the_device(shares: bool) -> None:
    q, k = (torch.randn(1, heads, 2048, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    gate = AttnGate(GateConfig(4, 2, 64, shares=shares)).cuda()
    prefill, rows = torch.eye(32, device="cuda").expand(1, 4, 32, 32), decode_rows(2048, "cuda")

    def learn() -> None:
        targets = {"prefill": prefill, "decode": decode_target(q, k, rows, 64, scale=0.125)}
        layer.learn(gate, q, k, targets, objectives.create("kl"), 1.0, 0.1)

    learn()
    torch.cuda.synchronize()
    with no_waiting():
        learn()
