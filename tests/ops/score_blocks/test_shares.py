"""Scores that are shares: what they are, where gradients go, that slices and packs change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from seerattention import AttnGate, GateConfig
from seerattention.ops.cases.score_blocks import CASES, Case, packed
from seerattention.ops.score_blocks import chunked, score_blocks
from seerattention.rows import Rows

SMALL = [case for case in CASES if not case.large]
by_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in SMALL}


@by_case
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_summary_by_summary(case: Case, backend: str) -> None:
    """Loops over query summaries, each of which sees the summaries of keys that begin by its end."""
    q, k, _ = case.normal(torch.float64)
    given = case.geometry
    scores = score_blocks(q, k, case.sub_blocks, scale=0.5, **given, shares=True, backend=backend)
    subs_q, subs_k = case.sub_blocks
    size_q, size_k = (given["block_size"][0] // subs for subs in case.sub_blocks)
    first = given["rows"].first if case.causal else math.inf
    wanted = torch.full(case.blocks, -math.inf, dtype=torch.float64)
    group = case.heads // case.kv_heads
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (case.batch, case.heads, case.queries))).tolist():
        seen = [j for j in range(case.keys) if j * size_k < first + (i + 1) * size_q]
        products = {j: 0.5 * float(q[b, h, i] @ k[b, h // group, j]) for j in seen}
        best = {}
        for j, product in products.items():
            best[j // subs_k] = max(product, best.get(j // subs_k, -math.inf))
        total = math.log(sum(map(math.exp, best.values())))
        for block, product in best.items():
            row = wanted[b, h, i // subs_q]
            row[block] = max(float(row[block]), product - total)
    if case.causal:
        wanted = wanted.masked_fill(~given["rows"].causal(given["block_size"]), 0)
    torch.testing.assert_close(scores, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["eight", "later-rows", "every-pair", "uneven"])
@pytest.mark.parametrize("slices", [1, 2**26])
def test_gradients_are_those_of_differences(name: str, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "SLICE_BYTES", slices)
    case = BY_NAME[name]
    torch.manual_seed(0)
    size = math.lcm(*case.sub_blocks)
    rows = Rows.last(2 * size + size // case.sub_blocks[0], 3 * size) if case.causal else None
    q = torch.randn(1, 2, 2 * case.sub_blocks[0] + 1, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 3 * case.sub_blocks[1], 2, dtype=torch.float64, requires_grad=True)
    options = {"rows": rows, "block_size": (size, size), "shares": True}
    torch.autograd.gradcheck(lambda q, k: score_blocks(q, k, case.sub_blocks, **options), (q, k))


@by_case
def test_slices_and_reference_are_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, gradient = case.normal(torch.float64)
    q, k = q.requires_grad_(), k.requires_grad_()
    options = {"scale": 0.5, "shares": True, **case.geometry}
    found = []
    for backend, size in (("reference", 0), ("chunked", 1), ("chunked", 5000)):
        monkeypatch.setattr(chunked, "SLICE_BYTES", size)
        scores = score_blocks(q, k, case.sub_blocks, **options, backend=backend)
        found.append((scores.detach(), *torch.autograd.grad(scores, (q, k), gradient.double())))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_packed_sequences_are_those_alone() -> None:
    rows, options, q, k = packed(torch.float64)
    scores = score_blocks(q, k, rows=rows, **options, shares=True)
    for one, (down, across) in rows.maps(options["block_size"]):
        own_q = q[:, :, rows.places(rows.num_queries, 4)[one.index]]
        own_k = k[one.index, None, :, : -(-one.rows.num_keys // 8)]
        alone = score_blocks(own_q, own_k, rows=one.rows, **options, shares=True)
        assert torch.equal(scores[:, :, down, across], alone)


def test_a_summary_of_a_whole_block_ranks_as_its_products() -> None:
    case = BY_NAME["no-sub-blocks"]
    q, k, _ = case.normal(torch.float64)
    products, shares = (
        score_blocks(q, k, (1, 1), **case.geometry, shares=shares) for shares in (False, True)
    )
    seen = case.geometry["rows"].causal(case.geometry["block_size"])
    products, shares = (x.masked_fill(~seen, -math.inf) for x in (products, shares))
    torch.testing.assert_close(shares, products.log_softmax(-1))


@pytest.mark.parametrize("tokens", [64, 70, 300])
def test_it_is_the_gates_score(tokens: int) -> None:
    torch.manual_seed(0)
    gate = AttnGate(GateConfig(4, 2, 16, shares=True))
    q, k, positions = torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16), torch.arange(tokens)
    with torch.no_grad():
        keys, queries = gate.compress(k, positions=positions), gate.summarise_queries(q, positions=positions)
        whole = score_blocks(
            queries, keys, (16, 16), scale=gate.scale, rows=Rows.last(tokens, tokens), shares=True
        )
        assert torch.equal(gate.score(q, keys, positions=positions), whole)
        assert torch.equal(gate(q, k), whole)
        # The last block's rows do not depend on what came before in the call.
        first = (tokens - 1) // 64 * 64
        torch.testing.assert_close(
            gate.score(q[:, :, first:], keys, positions=positions[first:]), whole[:, :, first // 64 :]
        )
        for first in (1, 3, 5):
            own = gate.summarise_queries(q[:, :, first:], positions=positions[first:])
            rows = Rows.last(tokens - first, tokens)
            expected = gate.score_summaries(own, keys, rows=rows)
            assert torch.equal(gate(q[:, :, first:], k), expected)
            assert torch.equal(gate.score(q[:, :, first:], keys, positions=positions[first:]), expected)
