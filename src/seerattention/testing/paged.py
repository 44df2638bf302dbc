"""What every backend of `block_sparse_attention` must do with keys and values in pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import reference
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.ops.options import Options
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection
from seerattention.testing.budget import Budget
from seerattention.testing.conformance import Backend
from seerattention.testing.inputs import random_qkv, random_selection


def paged_inputs(
    case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, BlockSelection, Options]:
    """Draw a call: q, k and v as they are without pages, the selection, and options with the block table."""
    q, k, v = random_qkv(case, dtype=dtype, device=device)
    assert case.page is not None
    first = case.shared * case.page
    for x in (k, v):
        x[:, :, :first] = x[:1, :, :first]
    selection = random_selection(case, density=case.density, heads=case.selection_heads, device=device)
    return q, k, v, selection, case.options(device)


def in_pages(x: Tensor, case: Case) -> Tensor:
    """Lay keys or values ``[B, Hk, Tk, D]`` out in the case's pages ``[P, Hk, page, D]``, amid NaN."""
    pages = case.pages()
    assert pages is not None
    assert case.page is not None
    out = x.new_full((pages.numel() + 1, x.shape[1], case.page, x.shape[3]), torch.nan)
    ends = torch.tensor((0, *case.held)).cumsum(0).tolist()
    for s, (start, end) in enumerate(pairwise(ends)):
        own = x[0, :, start:end] if case.lengths else x[s]
        token = torch.arange(own.shape[1])
        out[pages[s, token // case.page].long().to(x.device), :, (token % case.page).to(x.device)] = (
            own.transpose(0, 1)
        )
    return out


def unread(case: Case, selection: BlockSelection) -> Tensor:
    """Mark the keys that no query of a KV head reads, in no sequence that has them, bool ``[B, Hk, Tk]``."""
    nobody = torch.ones(case.batch, case.kv_heads, case.keys, dtype=torch.bool, device=selection.bits.device)
    row = 0
    for one in case.rows().sequences():
        rows = num_blocks(one.rows.num_queries, case.block_size[0])
        mask = reference.token_mask(selection.row_slice(row, row + rows), case.heads, one.rows)
        nobody[:, :, one.keys] = ~mask.any(2).unflatten(1, (case.kv_heads, -1)).any(2)
        row += rows
    if case.page is not None:
        shared = nobody[:, :, : case.shared * case.page]
        shared[:] = shared.all(0)
    return nobody


def check_paged(
    backend: Backend, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    """Check a backend on one case with pages.

    Raises:
        AssertionError: If what it returns is not what the reference returns for the same keys without pages,
            or changes by a bit with what nobody reads, with what lies around, or with strides.
    """
    q, k, v, selection, options = paged_inputs(case, dtype, device)
    asked = replace(options, return_lse=True)
    without = replace(asked, pages=None)

    def by_reference(which: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        run: Callable[..., Any] = reference.run
        return lambda q, k, v: run(q, k, v, selection, without)[which]

    keys, values = in_pages(k, case), in_pages(v, case)
    out, lse = backend.run(q, keys, values, selection, asked)
    Budget.of(by_reference(0), q, k, v).check(out)
    Budget.of(by_reference(1), q, k, v).check(lse)

    def same(keys: Tensor, values: Tensor) -> bool:
        return torch.equal(backend.run(q, keys, values, selection, options)[0], out)

    assert same(keys.nan_to_num(3.0), values.nan_to_num(3.0)), "what lies in no page of a sequence is read"
    marks = unread(case, selection)[..., None]
    poisoned = (in_pages(x.masked_fill(marks, torch.nan), case) for x in (k, v))
    assert same(*poisoned), "what is not read reaches the output"
    beside = torch.cat([keys, values], -1).split(keys.shape[3], -1)
    assert same(*beside), "keys beside their values are others"
    after = values.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(beside[0], after), "keys and values with strides of their own are others"
