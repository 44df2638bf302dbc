"""The CPU's kernel, compiled for every kind of CPU that this one can be; other tests do without it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention import gather, native
from seerattention.ops.cases.block_sparse_attention import CASES, OPTION_CASES, PAGED_CASES, Case
from seerattention.ops.options import Options
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing import conformance
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.mutants import Mutant, dropped_last_block, swapped_head_map, wrong_scale
from seerattention.testing.paged import check_paged, in_pages, paged_inputs

SMALL = [case for case in CASES if not case.large]
BY_NAME = {case.name: case for case in (*SMALL, *OPTION_CASES)}
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_conforms(level: str, case: Case) -> None:
    conformance.check_attention(native, case)
    conformance.attention_lse_matches_reference(native, case)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_half_precision(level: str, case: Case, dtype: torch.dtype) -> None:
    conformance.attention_lse_matches_reference(native, case, dtype)
    conformance.attention_matches_reference(native, case, dtype)
    conformance.attention_full_is_dense(native, case, dtype)
    if case.queries < case.keys:
        conformance.attention_ignores_unread(native, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("case", OPTION_CASES, ids=[case.name for case in OPTION_CASES])
def test_options(level: str, case: Case, dtype: torch.dtype) -> None:
    conformance.attention_matches_reference(native, case, dtype)
    conformance.attention_lse_matches_reference(native, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("case", PAGED_CASES, ids=[case.name for case in PAGED_CASES])
def test_pages(level: str, case: Case, dtype: torch.dtype) -> None:
    check_paged(native, case, dtype)


def test_a_page_that_there_is_not(level: str) -> None:
    case = PAGED_CASES[0]
    q, k, v, selection, options = paged_inputs(case)
    keys, values = in_pages(k, case), in_pages(v, case)
    assert options.pages is not None
    for wrong in (len(keys), -1):
        options.pages[1, 2] = wrong
        with pytest.raises(IndexError, match=f"pages name page {wrong}, but k and v have 13"):
            native.run(q, keys, values, selection, options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_runs_and_threads_change_no_bit(level: str, dtype: torch.dtype) -> None:
    case = BY_NAME["batch"]
    q, k, v = random_qkv(case, dtype=dtype)
    selection = random_selection(case, density=0.3)
    runs = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(native.run(q, k, v, selection, case.options(return_lse=True)))
    torch.set_num_threads(1)
    for out, lse in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert torch.equal(lse, runs[0][1])


def test_rows_do_not_see_nan_that_only_others_read(level: str) -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=500, keys=500, head_dim=64)
    for dtype in (torch.float32, *HALF):
        q, k, v = random_qkv(shape, dtype=dtype)
        selection = random_selection(shape, density=0.3)
        clean, _ = native.run(q, k, v, selection, Options.of(q, k))
        k[:, :, 128:192], v[:, :, 128:192] = torch.nan, torch.nan
        poisoned, _ = native.run(q, k, v, selection, Options.of(q, k))
        reads = selection.to_mask()[..., 2].repeat_interleave(64, -1)[..., :500]
        assert torch.equal(poisoned[~reads], clean[~reads])
        assert poisoned[reads].isnan().all()


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_any_scale(level: str, scale: float, dtype: torch.dtype) -> None:
    for name in ("unaligned-chunk", "softcap"):
        case = BY_NAME[name]
        q, k, v = random_qkv(case, dtype=dtype)
        selection, options = random_selection(case, density=0.3), replace(case.options(), scale=scale)
        reference = conformance._reference(selection, options)
        Budget.of(reference, q, k, v).check(native.run(q, k, v, selection, options)[0])


def test_a_query_that_sees_nothing_gets_zeros(level: str) -> None:
    q, k, v = random_qkv(Shape(name="", heads=1, kv_heads=1, queries=128, keys=128, head_dim=16))
    mask = torch.tensor([[[[True, False]]]])
    wide = BlockSelection.from_mask(torch.tensor([[[[False, True]]]]), (128, 64))
    out, lse = native.run(q, k, v, wide, Options.of(q, k, return_lse=True))
    assert lse is not None
    assert not out[:, :, :64].any()
    assert lse[:, :, :64].eq(-torch.inf).all()
    seen = BlockSelection.from_mask(mask, (64, 64))
    alone, _ = native.run(*(x[:, :, 64:] for x in (q, k, v)), seen, Options.of(q[:, :, 64:], k[:, :, 64:]))
    torch.testing.assert_close(out[:, :, 64:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_query_that_sees_nothing_beside_one_that_does_gets_zeros(level: str, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(Shape(name="", heads=1, kv_heads=1, queries=64, keys=72, head_dim=16), dtype=dtype)
    # Queries at positions 8 to 71 of keys from 64 on: eight lie in one register with those that see some.
    late = BlockSelection.from_mask(torch.tensor([[[[False, True]]]]), (64, 64))
    out, lse = native.run(q, k, v, late, Options.of(q, k, return_lse=True))
    assert lse is not None
    assert not out[:, :, :56].any()
    assert lse[:, :, :56].eq(-torch.inf).all()
    assert out[:, :, 56:].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_layouts(level: str, dtype: torch.dtype) -> None:
    case = BY_NAME["kv-selection"]
    selection, options = random_selection(case, density=0.3), case.options()
    q, k, v = random_qkv(case, dtype=dtype)
    plain, _ = native.run(q, k, v, selection, options)
    # Heads after tokens, as models hand them over; numbers of a head apart; a batch that is one expanded.
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart = [x.mT.contiguous().mT for x in (q, k, v)]
    for other in (tokens_first, apart):
        assert torch.equal(native.run(*other, selection, options)[0], plain)
    assert native.run(*tokens_first, selection, options)[0].stride() == tokens_first[0].stride()
    expanded = [x.expand(2, -1, -1, -1) for x in (q, k, v)]
    assert torch.equal(native.run(*expanded, selection, options)[0], plain.expand(2, -1, -1, -1))
    rows = selection.row_slice(2, 4)
    some = [q[:, :, 128:256], k[:, :, :256], v[:, :, :256]]
    fewer = BlockSelection(rows.bits, (*rows.shape[:3], 4), rows.block_size)
    assert torch.equal(native.run(*some, fewer, Options.of(*some[:2]))[0], plain[:, :, 128:256])


def test_bugs_are_noticed(level: str) -> None:
    for bug in (wrong_scale, dropped_last_block, swapped_head_map):
        with pytest.raises(AssertionError):
            conformance.check_attention(Mutant(bug, native), BY_NAME["unaligned-chunk"])


def test_chosen_once_it_is_compiled(level: str, tmp_path: Path) -> None:
    case = BY_NAME["thousand"]
    q, k, v = random_qkv(case)
    selection = random_selection(case, density=0.3)
    call = q, k, v, selection
    ours, theirs = (backend.run(*call, Options.of(q, k))[0] for backend in (native, gather))
    assert not torch.equal(ours, theirs)
    assert torch.equal(block_sparse_attention(*call), ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block_sparse_attention(*call), ours)
    # With gradients, as without it: there is a backward for them.
    leaf = q.clone().requires_grad_()
    assert native.unsupported(leaf, k, v, selection, Options.of(q, k)) == ["it has no backward"]
    assert torch.equal(block_sparse_attention(leaf, k, v, selection), theirs)
    with torch.no_grad():
        assert torch.equal(block_sparse_attention(leaf, k, v, selection), ours)
    torch.hub.set_dir(tmp_path / "hub")
    assert torch.equal(block_sparse_attention(*call), theirs)
    with pytest.raises(NotImplementedError, match=r"native: it is not compiled .* `seerattention build`"):
        block_sparse_attention(*call, backend="native")


def test_compiled_without_a_break(level: str) -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=100, keys=100, head_dim=16, block_size=(16, 16))
    qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(shape)]
    selection = random_selection(shape, density=0.4)
    for backend in ("auto", "native"):
        attend = partial(block_sparse_attention, backend=backend, return_lse=True)
        out, lse = torch.compile(attend, fullgraph=True, backend="aot_eager")(*qkv, selection)
        plain = native.run(*qkv, selection, Options.of(*qkv[:2], return_lse=True))
        assert torch.equal(out, plain[0])
        assert torch.equal(lse, plain[1])
        assert out.stride() == qkv[0].stride()


def call(**changed: object) -> list[str]:
    shape = {"heads": 2, "kv_heads": 1, "queries": 64, "keys": 64, "head_dim": 64} | changed
    q, k, v = random_qkv(Shape(name="", **shape))
    full = BlockSelection.full(Rows.last(64, 64), shape.get("block_size", (64, 64)))
    return native.unsupported(q, k, v, full, Options.of(q, k))


def test_reasons_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: None)
    assert call() == call(block_size=(24, 48)) == []
    assert call(head_dim=72) == ["head_dim must be a multiple of 16 up to 256, got 72"]
    assert call(head_dim=272) == ["head_dim must be a multiple of 16 up to 256, got 272"]
    assert call(block_size=(64, 24)) == ["KV blocks must be of a multiple of 16 tokens, got 24"]
    q, k, v = (x.double() for x in random_qkv(BY_NAME["one-block"]))
    full = BlockSelection.full(Rows.last(64, 64), (64, 64))
    options = Options.of(q, k)
    assert native.unsupported(q, k, v, full, options) == [
        "it takes float32, bfloat16 and float16, not torch.float64"
    ]
    meta = [x.to("meta") for x in (q, k, v)]
    assert native.unsupported(*meta, full, options) == ["it runs on a CPU, not on meta"]
