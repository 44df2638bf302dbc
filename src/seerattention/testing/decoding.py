"""What every backend of `block_sparse_decode` must do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.block_sparse_decode import reference
from seerattention.ops.cases.block_sparse_decode import Case
from seerattention.ops.options import DecodeOptions
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection
from seerattention.testing.budget import Budget
from seerattention.testing.conformance import Backend
from seerattention.testing.inputs import random_qkv


def decode_inputs(
    case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, BlockSelection, DecodeOptions]:
    """Draw a call: q, the cache's k and v in pages if the case has them, selection and options."""
    q, k, v = random_qkv(case, dtype=dtype, device=device)
    options = case.options(device)
    return q, paged(k, case), paged(v, case), decode_selection(case, device), options


def decode_selection(case: Case, device: str = "cpu", seed: int = 0) -> BlockSelection:
    """Draw a selection: a token's own block, and each earlier one with the case's probability."""
    heads, block = case.selection_heads or case.kv_heads, case.block_size[1]
    first = torch.arange(0, case.keys, block)
    positions = case.positions[:, None, :, None]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(case.batch, heads, case.queries, len(first), generator=generator)
    own = (first <= positions) & (positions < first + block)
    return BlockSelection.from_mask(
        (own | ((draws < case.density) & (first <= positions))).to(device), case.block_size, check=False
    )


def paged(x: Tensor, case: Case) -> Tensor:
    """Lay keys or values ``[B, Hk, Tk, D]`` out in the case's pages, ``[P, Hk, page, D]``."""
    pages = case.pages()
    if pages is None or case.page is None:
        return x
    missing = pages.shape[1] * case.page - x.shape[2]
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, case.page)).transpose(1, 2)
    out = torch.empty_like(x.flatten(0, 1))
    out[pages.flatten().long().to(x.device)] = x.flatten(0, 1)
    return out


def unread(case: Case, selection: BlockSelection) -> Tensor:
    """Mark the tokens of a cache without pages that no query of a KV head reads, bool ``[B, Hk, Tk]``."""
    mask = selection.to_mask().cpu()
    reads = mask.repeat_interleave(case.block_size[1], -1)[..., : case.keys]
    reads = (reads & (torch.arange(case.keys) <= case.positions[:, None, :, None])).any(2)
    if case.starts:
        # Each sequence from where its first key lies; what would wrap around is past its length.
        reads = torch.stack([own.roll(start, -1) for own, start in zip(reads, case.starts, strict=True)])
    heads = reads.shape[1]
    if heads > case.kv_heads:
        return ~reads.unflatten(1, (case.kv_heads, -1)).any(2)
    return ~reads.repeat_interleave(case.kv_heads // heads, 1)


def check_decode(
    backend: Backend, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    """Run every check of a `block_sparse_decode` backend.

    Raises:
        AssertionError: If one of them fails.
    """
    q, k, v, selection, options = decode_inputs(case, dtype, device)
    asked = replace(options, return_lse=True)

    def by_reference(q: Tensor, k: Tensor, v: Tensor, which: int = 0) -> Tensor:
        found = reference.run(q, k, v, selection, asked)[which]
        assert found is not None
        # What reads nothing has no denominator; compared by itself below.
        return found.masked_fill(found.isinf(), 0)

    out, lse = backend.run(q, k, v, selection, asked)
    Budget.of(by_reference, q, k, v).check(out)
    nothing = torch.isinf(lse)
    if not case.sinks:
        blind = (case.positions < 0).to(device)[:, None].expand_as(nothing)
        assert torch.equal(nothing, blind), "lse is to be finite where a query sees keys, and only there"
        assert not out[blind].any(), "a query that sees nothing gets zeros"
    Budget.of(lambda q, k, v: by_reference(q, k, v, 1), q, k, v).check(lse.masked_fill(nothing, 0))
    plain, none = backend.run(q, k, v, selection, options)
    assert torch.equal(plain, out), "return_lse changes the output"
    assert none is None, "lse was not asked for"
    _ignores_unread(backend, case, out, (q, k, v, selection, options))


#: q, k, v, selection and options.
Call = tuple[Tensor, Tensor, Tensor, BlockSelection, DecodeOptions]


def _ignores_unread(backend: Backend, case: Case, clean: Tensor, call: Call) -> None:
    """Check that NaN in what nobody reads, of the cache and of pages of nobody, changes no bit."""
    q, k, v, selection, options = call
    marks = paged(unread(case, selection)[..., None].to(torch.float32), case).bool().to(k.device)
    k, v = (x.masked_fill(marks, torch.nan) for x in (k, v))
    poisoned = backend.run(q, k, v, selection, options)[0]
    assert torch.equal(poisoned, clean), "what is not read reaches the output"
    if options.pages is not None:
        # Another page in front, and numbers of no page past every sequence's length.
        k, v = (torch.cat([torch.full_like(x[:1], torch.nan), x]) for x in (k, v))
        assert case.page is not None
        used = num_blocks_of(case, options.pages.shape[1]).to(k.device)
        pages = torch.where(used, options.pages + 1, torch.iinfo(torch.int32).max)
        moved = backend.run(q, k, v, selection, replace(options, pages=pages.to(torch.int32)))[0]
        assert torch.equal(moved, clean), "pages outside a sequence's table reach the output"


def num_blocks_of(case: Case, each: int) -> Tensor:
    """Mark the pages of every sequence that hold keys, bool ``[B, each]``."""
    assert case.page is not None
    last = [num_blocks(int(p) + 1, case.page) for p in case.positions[:, -1]]
    return torch.arange(each) < torch.tensor(last)[:, None]


def decode_is_the_last_rows_of_prefill(
    backend: Backend, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    """Check that every sequence alone gets what `block_sparse_attention` gives for its last rows."""
    assert case.page is None
    q, k, v, selection, options = decode_inputs(case, dtype, device)
    out, _ = backend.run(q, k, v, selection, options)
    for b, position in enumerate(case.positions[:, -1].tolist()):
        rows = min(case.queries, position + 1)
        if rows:
            columns = num_blocks(position + 1, case.block_size[1])
            mask = selection.to_mask()[b : b + 1, :, -rows:, :columns]
            chosen = BlockSelection.from_mask(mask, case.block_size)
            start = case.starts[b] if case.starts else 0
            keys = slice(start, start + position + 1)
            own = q[b : b + 1, :, -rows:], *(x[b : b + 1, :, keys] for x in (k, v))

            def attend(q: Tensor, k: Tensor, v: Tensor, chosen: BlockSelection = chosen) -> Tensor:
                return block_sparse_attention(
                    q, k, v, chosen, scale=options.scale, softcap=options.softcap, sinks=options.sinks,
                    backend="reference",
                )  # fmt: skip

            Budget.of(attend, *own).check(out[b : b + 1, :, -rows:])
