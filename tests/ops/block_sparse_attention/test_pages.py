"""Keys and values in pages, in the backends that run on any CPU; others run the checks in their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention import BlockSelection, block_sparse_attention, block_sparse_decode
from seerattention.ops.block_sparse_attention import BACKENDS, Attended, flex, gather, reference
from seerattention.ops.cases.block_sparse_attention import PAGED_CASES, Case
from seerattention.ops.options import Options
from seerattention.rows import Rows
from seerattention.testing.memory import LargestTensor
from seerattention.testing.mutants import Mutant
from seerattention.testing.paged import check_paged, in_pages, paged_inputs, unread

BY_NAME = {case.name: case for case in PAGED_CASES}


def call(name: str) -> tuple[Tensor, Tensor, Tensor, BlockSelection, Options]:
    """Return q, k and v in pages, selection and options."""
    q, k, v, selection, options = paged_inputs(BY_NAME[name])
    return q, in_pages(k, BY_NAME[name]), in_pages(v, BY_NAME[name]), selection, options


@pytest.mark.parametrize("backend", [reference, gather], ids=["reference", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_pages(backend: ModuleType, dtype: torch.dtype, case: Case) -> None:
    check_paged(backend, case, dtype)


def test_cases_leave_something_unread() -> None:
    some = {case.name for case in PAGED_CASES if unread(case, paged_inputs(case)[3]).any()}
    assert some == set(BY_NAME) - {"pages-of-a-prompt", "one-token-in-a-page"}


@pytest.mark.parametrize("name", ["pages", "packed-small-pages"])
def test_public_function(name: str) -> None:
    q, k, v, selection, options = call(name)
    found = block_sparse_attention(
        q, k, v, selection, softcap=options.softcap, sinks=options.sinks, rows=options.rows,
        pages=options.pages, return_lse=True, backend="gather",
    )  # fmt: skip
    assert isinstance(found, Attended)
    out, lse = gather.run(q, k, v, selection, replace(options, return_lse=True))
    assert torch.equal(found.out, out)
    assert lse is not None
    assert torch.equal(found.lse, lse)


def test_a_row_of_prefill_is_a_step_of_decoding() -> None:
    q, k, v, _, options = call("wide-pages")
    mask = torch.arange(20).view(1, 2, 1, 10) % 3 == 0
    selection = BlockSelection.from_mask(mask | (torch.arange(10) == 9), (1, 64))
    row = block_sparse_attention(
        q[:, :, -1:], k, v, selection, rows=Rows.last(1, 600), pages=options.pages, backend="gather"
    )
    assert options.pages is not None
    table, length = options.pages[:, :3].contiguous(), torch.tensor([600], dtype=torch.int32)
    wide = BlockSelection.from_mask(torch.nn.functional.pad(selection.to_mask(), (0, 2)), (1, 64))
    step = block_sparse_decode(q[:, :, -1:], k, v, wide, lengths=length, pages=table, backend="gather")
    torch.testing.assert_close(row, step)


def test_gather_touches_only_what_was_selected() -> None:
    case = Case(name="", heads=2, kv_heads=1, queries=64, keys=64 * 256, page=64, density=0.02)
    q, k, v, selection, options = paged_inputs(case)
    keys, values = in_pages(k, case), in_pages(v, case)
    with LargestTensor() as largest:
        gather.run(q, keys, values, selection, options)
    assert 0 < largest.bytes <= k.nbytes / 8


@pytest.mark.parametrize("name", ["pages", "packed-pages"])
def test_compiled_without_a_break(name: str) -> None:
    q, k, v, selection, options = call(name)

    def attend(q: Tensor, k: Tensor, v: Tensor, pages: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, selection, rows=options.rows, pages=pages, backend="gather")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, options.pages), attend(q, k, v, options.pages))


def page_before(run: Callable[..., Any], *given: Any) -> Any:
    """Every block is read from the page before its own."""
    *inputs, options = given
    return run(*inputs, replace(options, pages=options.pages.roll(1, 1).clamp(max=5)))


def next_sequence(run: Callable[..., Any], *given: Any) -> Any:
    """A sequence reads the pages of the next one."""
    *inputs, options = given
    return run(*inputs, replace(options, pages=options.pages.roll(1, 0)))


def place_before(run: Callable[..., Any], q: Tensor, k: Tensor, *rest: Any) -> Any:
    """The places in a page are off by one."""
    return run(q, k.roll(1, 2), *rest)


def past_the_end(run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """Values after the last key are multiplied by shares of zero."""
    *given, options = rest
    out, lse = run(q, k, v, *given, options)
    last = options.pages[:, (options.rows.num_keys - 1) // v.shape[2]].long()
    return out + 0 * v[last].sum(), lse


@pytest.mark.parametrize("bug", [page_before, next_sequence, place_before, past_the_end])
def test_planted_bugs_are_noticed(bug: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        check_paged(Mutant(bug, gather), BY_NAME["pages"])


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_a_page_that_there_is_not(backend: str) -> None:
    q, k, v, selection, options = call("pages")
    assert options.pages is not None
    options.pages[1, 2] = len(k)
    with pytest.raises(IndexError):
        block_sparse_attention(q, k, v, selection, rows=options.rows, pages=options.pages, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": None}, ValueError, "pages do not say how many keys there are; give rows="),
        ({"rows": Rows.last(77, 449)}, ValueError, "a sequence has 449 keys, but pages has 6 of 64 tokens"),
        ({"rows": Rows.last(76, 301)}, ValueError, "rows are of 76 queries"),
        ({"pages": [[1]]}, TypeError, "pages must be a tensor of int32, got list"),
        ({"pages": torch.ones(2, 6)}, TypeError, "pages must be int32, got torch.float32"),
        ({"pages": torch.ones(2, dtype=torch.int32)}, ValueError, r"pages must be \[B, N\] for a batch of 2"),
        ({"pages": torch.ones(3, 6, dtype=torch.int32)}, ValueError, r"for a batch of 2, got \[3, 6\]"),
        ({"k": torch.zeros(12, 2, 64, 64)}, ValueError, "k and v must have one shape"),
        (
            {"k": torch.zeros(15, 3, 64, 64), "v": torch.zeros(15, 3, 64, 64)},
            ValueError,
            "a multiple of KV heads",
        ),
    ],
)
def test_bad_input_is_a_sentence(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v, selection, options = call("pages")
    given = {"k": k, "v": v, "rows": options.rows, "pages": options.pages} | change
    with pytest.raises(error, match=message):
        block_sparse_attention(q, selection=selection, **given)


def test_packed_sequences_have_a_table_each() -> None:
    q, k, v, selection, options = call("packed-pages")
    assert options.pages is not None
    with pytest.raises(ValueError, match=r"pages must be \[S, N\] for 5 packed sequences, got \[4, 5\]"):
        block_sparse_attention(q, k, v, selection, rows=options.rows, pages=options.pages[1:])


@pytest.mark.parametrize("which", ["q", "k", "v", "sinks"])
def test_no_gradient(which: str) -> None:
    q, k, v, selection, options = call("pages")
    given = {"q": q, "k": k, "v": v, "sinks": torch.zeros(4)}
    given[which].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"in pages have no gradient; call under torch.no_grad"):
        block_sparse_attention(selection=selection, rows=options.rows, pages=options.pages, **given)
    with torch.no_grad():
        block_sparse_attention(selection=selection, rows=options.rows, pages=options.pages, **given)


def test_backends_that_take_none() -> None:
    q, k, v, selection, options = call("pages")
    assert flex.unsupported(q, k, v, selection, options)[-1] == "it takes no keys in pages"
    assert BACKENDS["hopper"].unsupported(q, k, v, selection, options)[-1] == (
        "it reads no block table, so keys must lie behind one another"
    )
    q, k, v, selection, options = call("odd-pages")
    assert BACKENDS["triton"].unsupported(q, k, v, selection, options)[-1] == (
        "pages must hold whole blocks of 64 tokens, or 16 tokens or more that divide one, got 48"
    )
