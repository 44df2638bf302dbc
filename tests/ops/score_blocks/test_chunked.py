"""The specification of `score_blocks`: what it computes, where gradients go, what it keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seerattention import AttnGate, GateConfig
from seerattention.ops.cases.score_blocks import CASES, Case
from seerattention.ops.score_blocks import chunked, score_blocks
from seerattention.rows import Rows
from seerattention.testing.memory import LargestTensor
from seerattention.testing.packed import check_packed_scores

SMALL = [case for case in CASES if not case.large]
by_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in SMALL}


@by_case
def test_pair_by_pair(case: Case) -> None:
    """Loops over blocks and pairs, in the order in which the first of equals is found first."""
    q, k, gradient = case.whole(torch.float64)
    q, k = q.requires_grad_(), k.requires_grad_()
    scores = score_blocks(q, k, case.sub_blocks, scale=0.5, **case.geometry)
    assert scores.shape == case.blocks
    scores.backward(gradient.double())
    assert q.grad is not None
    assert k.grad is not None
    wanted_q, wanted_k = torch.zeros_like(q), torch.zeros_like(k)
    subs_q, subs_k = case.sub_blocks
    valid = torch.ones(case.blocks[2:], dtype=torch.bool)
    if case.causal:
        valid = case.geometry["rows"].causal(case.geometry["block_size"])
    with torch.no_grad():
        products = q @ k.repeat_interleave(case.heads // case.kv_heads, 1).mT
        for b, h, r, c in torch.cartesian_prod(*map(torch.arange, case.blocks)).tolist():
            if not valid[r, c]:
                assert scores[b, h, r, c] == 0
                continue
            tile = products[b, h, r * subs_q : (r + 1) * subs_q, c * subs_k : (c + 1) * subs_k]
            assert scores[b, h, r, c] == tile.max() / 2
            i, j = divmod(tile.flatten().tolist().index(float(tile.max())), tile.shape[1])
            i, j, g = r * subs_q + i, c * subs_k + j, h // (case.heads // case.kv_heads)
            wanted_q[b, h, i] += gradient[b, h, r, c] / 2 * k[b, g, j]
            wanted_k[b, g, j] += gradient[b, h, r, c] / 2 * q[b, h, i]
    assert torch.equal(q.grad, wanted_q)
    assert torch.equal(k.grad, wanted_k)


@pytest.mark.parametrize("name", ["eight", "later-rows", "every-pair", "four"])
@pytest.mark.parametrize("slices", [1, 2**26])
def test_gradients_are_those_of_differences(name: str, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "SLICE_BYTES", slices)
    case = BY_NAME[name]
    torch.manual_seed(0)
    # Some blocks, the last of them short.
    case = replace(case, queries=2 * case.sub_blocks[0] + 1, keys=2 * case.sub_blocks[1] + 1)
    q, k = (
        torch.randn(1, heads, size, 2, dtype=torch.float64, requires_grad=True)
        for heads, size in ((2, case.queries), (1, case.keys))
    )
    torch.autograd.gradcheck(lambda q, k: score_blocks(q, k, case.sub_blocks, **case.geometry), (q, k))


@by_case
def test_slices_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, gradient = case.whole()
    found = []
    for size in (2**26, 1, 5000):
        monkeypatch.setattr(chunked, "SLICE_BYTES", size)
        q, k = (x.detach().requires_grad_() for x in (q, k))
        scores = score_blocks(q, k, case.sub_blocks, scale=0.5, **case.geometry)
        found.append((scores.detach(), *torch.autograd.grad(scores, (q, k), gradient)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            # Slices add up the gradients of keys in another order.
            assert (a - b).abs().max() <= 16 * torch.finfo(a.dtype).eps * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_sequences_are_those_alone(backend: str) -> None:
    check_packed_scores(backend)


@by_case
def test_reference_and_slices_are_one(case: Case) -> None:
    q, k, gradient = case.whole()
    q, k = q.requires_grad_(), k.requires_grad_()
    found = []
    for backend in ("reference", "chunked"):
        scores = score_blocks(q, k, case.sub_blocks, scale=0.5, **case.geometry, backend=backend)
        found.append((scores.detach(), *torch.autograd.grad(scores, (q, k), gradient)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_it_is_the_gates_score(per_kv_head: bool) -> None:
    torch.manual_seed(0)
    gate = AttnGate(GateConfig(4, 2, 16, per_kv_head=per_kv_head))
    q, k, positions = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 300, 16), torch.arange(300)
    with torch.no_grad():
        keys = gate.compress(k, positions=positions)
        whole = gate.score(q, keys, positions=positions)
        queries = gate.summarise_queries(q, positions=positions)
        assert torch.equal(gate.score_summaries(queries, keys), whole)
        assert torch.equal(gate.score_summaries(queries, keys, rows=Rows.last(300, 300)), whole.tril())


def test_neither_pass_makes_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "SLICE_BYTES", 2**16)
    q = torch.randn(1, 2, 512, 8, requires_grad=True)
    k = torch.randn(1, 1, 512, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        scores = score_blocks(q, k, (8, 8))
    assert max(kept) <= q.numel()
    with LargestTensor() as largest:
        scores.sum().backward()
    assert largest.bytes <= 2**16


def test_autocast_rounds_nothing() -> None:
    q, k, _ = BY_NAME["eight"].normal()
    wanted = score_blocks(q, k, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score_blocks(q, k, (8, 8)), wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(1, 1, 8)}, ValueError, r"keys must be \[B, H, S >= 1, E\], got \[1, 1, 8\]"),
        ({"queries": torch.zeros(1, 2, 0, 4)}, ValueError, "queries must be"),
        ({"keys": torch.zeros(1, 1, 8, 4).half()}, TypeError, "must share one floating-point dtype"),
        ({"keys": torch.zeros(1, 1, 8, 5)}, ValueError, "must agree in batch and dimension"),
        ({"keys": torch.zeros(1, 3, 8, 4)}, ValueError, "must be a multiple of those of keys, got 2 and 3"),
        ({"sub_blocks": (0, 2)}, ValueError, r"at least one summary per block, got \(0, 2\)"),
        ({"rows": Rows.last(8, 8)}, ValueError, "8 queries and 8 keys have 1 and 1 summaries, got 8 and 8"),
        ({"rows": Rows.last(8, 8), "block_size": (3, 4)}, ValueError, "must divide the blocks of"),
        ({"rows": Rows.packed([(8, 8)] * 2)}, ValueError, "must agree in batch and dimension"),
        ({"backend": "no"}, ValueError, "unknown backend 'no'"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, error: type[Exception], message: str) -> None:
    args = {"queries": torch.zeros(1, 2, 8, 4), "keys": torch.zeros(1, 1, 8, 4), "sub_blocks": (2, 2)}
    with pytest.raises(error, match=message):
        score_blocks(**args | change)
