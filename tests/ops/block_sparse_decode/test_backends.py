from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seerattention.ops.block_sparse_attention import Attended
from seerattention.ops.block_sparse_decode import block_sparse_decode, gather, reference
from seerattention.ops.cases.block_sparse_decode import CASES, Case
from seerattention.ops.dense_attention import dense_attention
from seerattention.selection import BlockSelection
from seerattention.testing.budget import Budget
from seerattention.testing.decoding import (
    check_decode,
    decode_inputs,
    decode_is_the_last_rows_of_prefill,
    decode_selection,
)
from seerattention.testing.inputs import random_qkv
from seerattention.testing.memory import LargestTensor

SMALL = [case for case in CASES if not case.large]
by_name = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


@pytest.mark.parametrize("backend", [reference, gather], ids=["reference", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_name
def test_every_check(backend, dtype: torch.dtype, case: Case) -> None:
    check_decode(backend, case, dtype)


@by_name
def test_rows_of_prefill(case: Case) -> None:
    decode_is_the_last_rows_of_prefill(gather, replace(case, page=None))


def test_a_full_selection_is_dense_attention() -> None:
    case = Case(name="", keys=300, queries=3, density=1.0)
    q, k, v = random_qkv(case)
    budget = Budget.of(lambda q, k, v: dense_attention(q, k, v, scale=0.125), q, k, v)
    out = block_sparse_decode(q, k, v, decode_selection(case))
    assert isinstance(out, torch.Tensor)
    budget.check(out)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_token_by_token_is_all_at_once(backend: str) -> None:
    """A static cache that fills up: each step reads what the step of all tokens reads for its token."""
    case = Case(name="", keys=256, queries=5, held=(200,))
    q, k, v, selection, options = decode_inputs(case)
    at_once = block_sparse_decode(q, k, v, selection, lengths=options.lengths, backend=backend)
    assert isinstance(at_once, torch.Tensor)
    lengths = torch.tensor([195], dtype=torch.int32)
    for token in range(5):
        lengths += 1
        alone = selection.row_slice(token, token + 1)
        step = block_sparse_decode(q[:, :, token : token + 1], k, v, alone, lengths=lengths, backend=backend)
        torch.testing.assert_close(step, at_once[:, :, token : token + 1])


@pytest.mark.parametrize("name", ["ragged", "wide-pages"])
def test_any_strides(name: str) -> None:
    """As caches and engines lay them out: heads after tokens, keys beside values, or nothing in order."""
    case = next(case for case in CASES if case.name == name)
    q, k, v, selection, options = decode_inputs(case)
    expected, _ = gather.run(q, k, v, selection, options)
    after = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    beside = torch.cat([k, v], -1).split(k.shape[3], -1)
    odd = (torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (k, v))
    for keys, values in (after, beside, odd):
        assert torch.equal(gather.run(q, keys, values, selection, options)[0], expected)


def test_a_long_cache_is_not_copied() -> None:
    case = Case(name="", keys=16384, density=0.02)
    q, k, v, selection, options = decode_inputs(case)
    with LargestTensor() as largest:
        gather.run(q, k, v, selection, options)
    assert 0 < largest.bytes <= k.nbytes / 16


class WrongPage:
    """Reads the page before."""

    unsupported = gather.unsupported

    @staticmethod
    def run(q, k, v, selection, options):
        if options.pages is not None:
            options = replace(options, pages=options.pages.roll(1, 1))
        return gather.run(q, k, v, selection, options)


class UnionOfTokens:
    """Drafted tokens read what any of them selected."""

    unsupported = gather.unsupported

    @staticmethod
    def run(q, k, v, selection, options):
        mask = selection.to_mask().any(2, keepdim=True).expand(-1, -1, q.shape[2], -1)
        return gather.run(q, k, v, BlockSelection.from_mask(mask, selection.block_size, check=False), options)


class PastTheEnd:
    """Takes the cache to be full."""

    unsupported = gather.unsupported

    @staticmethod
    def run(q, k, v, selection, options):
        return gather.run(q, k, v, selection, replace(options, lengths=None))


class IntoThePadding:
    """Takes every sequence to begin where the cache does."""

    unsupported = gather.unsupported

    @staticmethod
    def run(q, k, v, selection, options):
        return gather.run(q, k, v, selection, replace(options, starts=None))


class SplitLost:
    """The last of four parts of a list is not merged."""

    unsupported = gather.unsupported

    @staticmethod
    def run(q, k, v, selection, options):
        mask = selection.to_mask()
        rank = mask.cumsum(-1) - 1
        kept = mask & (rank < mask.sum(-1, keepdim=True) * 3 // 4)
        chosen = BlockSelection.from_mask(kept, selection.block_size, check=False)
        return gather.run(q, k, v, chosen, options)


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (WrongPage, "paged"),
        (UnionOfTokens, "drafted"),
        (PastTheEnd, "ragged"),
        (IntoThePadding, "padded"),
        (SplitLost, "one-token"),
    ],
)
def test_planted_bugs_are_noticed(mutant, name: str) -> None:
    with pytest.raises(AssertionError):
        check_decode(mutant, next(case for case in CASES if case.name == name))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": (2, 64)}, ValueError, "every token alone"),
        ({"page": 96}, ValueError, "a page of 96 tokens must hold whole blocks of 64"),
        ({"keys": 500}, ValueError, "select again for this cache"),
        ({"lengths": [3]}, TypeError, "lengths must be int32"),
        ({"lengths": (3,)}, TypeError, "lengths must be a tensor of int32, got tuple"),
        (
            {"lengths": torch.ones(2, dtype=torch.int32)},
            ValueError,
            r"lengths must be \[B\] for a batch of 1",
        ),
        ({"lengths": torch.tensor([641], dtype=torch.int32)}, ValueError, "of 0 to 640 keys.* got 641"),
        ({"lengths": torch.tensor([-1], dtype=torch.int32)}, ValueError, "of 0 to 640 keys.* got -1"),
        ({"starts": [641]}, ValueError, "starts must be of 0 to 640.* got 641"),
        ({"starts": [9], "page": 64}, ValueError, "starts are of a cache without pages"),
        (
            {"starts": [9], "lengths": torch.tensor([632], dtype=torch.int32)},
            ValueError,
            "of 0 to 631 keys.* got 632",
        ),
        ({"pages": torch.ones(1, dtype=torch.int32)}, ValueError, r"pages must be \[B, N\]"),
        ({"batch": 2}, ValueError, "needs pages=, its block table"),
        ({"heads": 3}, ValueError, "the selection has 3 heads"),
    ],
)
def test_bad_input_is_a_sentence(change: dict, error: type[Exception], message: str) -> None:
    case = Case(name="", keys=640)
    q, k, v, selection, _ = decode_inputs(case)
    lengths, pages = change.get("lengths"), change.get("pages")
    starts = torch.tensor(change["starts"], dtype=torch.int32) if "starts" in change else None
    if isinstance(lengths, list):
        lengths = torch.tensor(lengths)
    if "block_size" in change:
        selection = BlockSelection(selection.bits, selection.shape, change["block_size"])
    if "page" in change:
        k, v = (x.view(1, 2, -1, 64)[:, :, :576].view(2, 3, 2, 96, 64)[0].contiguous() for x in (k, v))
        pages = torch.zeros(1, 3, dtype=torch.int32)
    if "keys" in change:
        k, v = k[:, :, :500], v[:, :, :500]
    if "batch" in change:
        k, v = k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)
    if "heads" in change:
        selection = BlockSelection(selection.bits[:, [0, 1, 1]], (1, 3, *selection.shape[2:]), (1, 64))
    with pytest.raises(error, match=message):
        block_sparse_decode(q, k, v, selection, lengths=lengths, pages=pages, starts=starts)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_a_step_without_sequences(backend: str) -> None:
    q, k, v, selection, _ = decode_inputs(Case(name="", keys=640))
    found = block_sparse_decode(q[:0], k[:0], v[:0], selection, return_lse=True, backend=backend)
    assert isinstance(found, Attended)
    assert (found.out.shape, found.lse.shape) == (q[:0].shape, q[:0, ..., 0].shape)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_gradient_not_of_sinks_either(compiled: bool) -> None:
    q, k, v, selection, _ = decode_inputs(Case(name="", keys=640))
    q, sinks = q.requires_grad_(), torch.zeros(q.shape[1], requires_grad=True)

    def step(q: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor | Attended:
        return block_sparse_decode(q, k, v, selection, sinks=sinks)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    out = run(q, sinks)
    assert isinstance(out, torch.Tensor)
    assert not out.requires_grad
