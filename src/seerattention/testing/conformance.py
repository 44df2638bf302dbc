"""What every backend of an op must do, as functions of the backend: a test or a planted bug passes it in.

A backend is anything with ``unsupported`` and ``run``: a module of `seerattention.ops`, or a mutant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import reference as attention_reference
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.ops.cases.pooled_attention import PoolCase
from seerattention.ops.options import Options, PoolOptions
from seerattention.ops.pooled_attention import reference as pooled_reference
from seerattention.rows import Rows, num_blocks
from seerattention.selection import BlockSelection
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.poison import poison, unread_tokens


class Backend(Protocol):
    """A backend of an op, as a module or an object."""

    def unsupported(self, *args: Any, **kwargs: Any) -> list[str]:
        """Return the reasons why it cannot run."""
        ...

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the op."""
        ...


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Causal attention by the book, from the last ``Tq`` of ``Tk`` tokens: ``[B, Hq, Tq, D]``."""
    return dense_weights(q, k, scale=scale) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def dense_weights(
    q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return the causal softmax map ``[B, Hq, Tq, Tk]``."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
    later = torch.arange(k.shape[2], device=q.device)[None, :] > query[:, None]
    scores = scores.masked_fill(later, float("-inf"))
    if sinks is not None:
        logits = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logits], -1)
    return scores.softmax(-1)[..., : k.shape[2]]


def _inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, BlockSelection, Options]:
    selection = random_selection(case, density=case.density, heads=case.selection_heads)
    return *random_qkv(case, dtype=dtype), selection, case.options()


def _reference(
    selection: BlockSelection, options: Options, which: int = 0
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the reference as a function of q, k and v, for its output (0) or its lse (1)."""
    both = replace(options, return_lse=True)
    run: Callable[..., Any] = attention_reference.run
    return lambda q, k, v: run(q, k, v, selection, both)[which]


def attention_matches_reference(backend: Backend, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Check the output against the reference, within the error budget."""
    q, k, v, selection, options = _inputs(case, dtype)
    budget = Budget.of(_reference(selection, options), q, k, v)
    budget.check(backend.run(q, k, v, selection, options)[0])


def attention_lse_matches_reference(backend: Backend, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Check the logarithm of the softmax's denominator, and that asking for it changes no output."""
    q, k, v, selection, options = _inputs(case, dtype)
    out, lse = backend.run(q, k, v, selection, replace(options, return_lse=True))
    plain, nothing = backend.run(q, k, v, selection, replace(options, return_lse=False))
    assert torch.equal(out, plain), "return_lse changes the output"
    assert nothing is None, "lse was not asked for"
    Budget.of(_reference(selection, options, 1), q, k, v).check(lse)


def attention_full_is_dense(backend: Backend, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Check that a full selection gives dense attention, within the error budget."""
    q, k, v = random_qkv(case, dtype=dtype)
    options = Options.of(q, k)
    budget = Budget.of(lambda q, k, v: dense_attention(q, k, v, scale=options.scale), q, k, v)
    full = BlockSelection.full(Rows.last(case.queries, case.keys), case.block_size)
    budget.check(backend.run(q, k, v, full, options)[0])


def attention_ignores_unread(backend: Backend, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Check that NaN in keys and values that nobody reads changes no bit of the output.

    Raises:
        AssertionError: Also if the case leaves nothing unread: give it fewer queries than keys.
    """
    q, k, v, selection, options = _inputs(case, dtype)
    assert unread_tokens(selection, case.kv_heads, case.keys).any(), f"{case.name} reads every block"
    clean, _ = backend.run(q, k, v, selection, options)
    assert not clean.isnan().any(), "NaN without poison"
    poisoned, _ = backend.run(q, *poison(k, v, selection), selection, options)
    assert torch.equal(clean, poisoned), "unread keys or values reach the output"


def attention_rows_are_isolated(backend: Backend, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Check that a block changes only the rows that select it, and a token only causally later ones."""
    q, k, v, selection, options = _inputs(case, dtype)
    clean, _ = backend.run(q, k, v, selection, options)
    block_k = selection.block_size[1]
    reads = attention_reference.token_mask(selection, case.heads, options.rows)
    for block in range(0, num_blocks(case.keys, block_k), 2):
        # From the block's middle on, so that a limit off by one inside the block is seen as well.
        changed = slice(min(block * block_k + block_k // 2, case.keys - 1), (block + 1) * block_k)
        other_k, other_v = k.clone(), v.clone()
        other_k[:, :, changed] += 3
        other_v[:, :, changed] -= 3
        other, _ = backend.run(q, other_k, other_v, selection, options)
        blind = ~reads[..., changed].any(-1)
        assert torch.equal(clean[blind], other[blind]), f"rows that do not read KV block {block} changed"
        seeing = (clean != other).any(-1)[~blind]
        assert seeing.all(), f"rows that read KV block {block} did not change"


def attention_equals_expanded_heads(backend: Backend, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Check that grouped KV heads give what KV heads repeated for every query head give."""
    q, k, v, selection, options = _inputs(case, dtype)
    groups = case.heads // case.kv_heads
    budget = Budget.of(_reference(selection, options), q, k, v)
    wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    budget.check(backend.run(q, wide_k, wide_v, selection, options)[0])
    per_head = selection.to_mask().repeat_interleave(case.heads // selection.shape[1], 1)
    wide = BlockSelection.from_mask(per_head, selection.block_size)
    budget.check(backend.run(q, k, v, wide, options)[0])


def attention_batch_rows_are_independent(
    backend: Backend, case: Case, dtype: torch.dtype = torch.float32
) -> None:
    """Check that a sequence of a batch gets what it gets alone, with its own and with a shared selection."""
    case = replace(case, batch=3)
    q, k, v, selection, options = _inputs(case, dtype)
    first = BlockSelection.from_mask(selection.to_mask()[:1], selection.block_size)
    out, shared = (backend.run(q, k, v, s, options)[0] for s in (selection, first))
    for b in range(case.batch):
        alone = BlockSelection.from_mask(selection.to_mask()[b : b + 1], selection.block_size)
        one = slice(b, b + 1)
        for together, chosen in ((out, alone), (shared, first)):
            budget = Budget.of(_reference(chosen, options), *(x[one] for x in (q, k, v)))
            budget.check(together[one])


#: Checks of a `block_sparse_attention` backend on one case. `attention_ignores_unread` is apart: it
#: needs a case with fewer queries than keys.
ATTENTION_CHECKS = (
    attention_matches_reference,
    attention_full_is_dense,
    attention_rows_are_isolated,
    attention_equals_expanded_heads,
    attention_batch_rows_are_independent,
)


def check_attention(backend: Backend, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Run every check of a `block_sparse_attention` backend that the case allows.

    Raises:
        AssertionError: If one of them fails.
    """
    for check in ATTENTION_CHECKS:
        check(backend, case, dtype)
    if case.queries < case.keys:
        attention_ignores_unread(backend, case, dtype)


def slow_pooled_map(q: Tensor, k: Tensor, block_size: tuple[int, int], options: PoolOptions) -> Tensor:
    """Return the target one block at a time, ``[B, Hq or Hk, rows, columns]`` in the dtype of q."""
    pooled = q.new_zeros(*q.shape[:2], *options.map_shape(q, k, block_size)[2:])
    (block_q, block_k), mass = block_size, options.pool == "mass"
    row = 0
    for one in options.rows.sequences():
        share = dense_weights(
            q[:, :, one.queries], k[:, :, one.keys],
            scale=options.scale, softcap=options.softcap, sinks=options.sinks,
        )  # fmt: skip
        rows, columns = one.rows.num_blocks(block_size)
        for i in range(rows):
            for j in range(columns):
                tile = share[:, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
                pooled[:, :, row + i, j] = tile.sum(3).amax(2) if mass else tile.amax((2, 3))
        row += rows
    if options.per_kv_head:
        pooled = torch.stack([heads.amax(1) for heads in pooled.tensor_split(k.shape[1], 1)], 1)
    return pooled / pooled.sum(-1, keepdim=True)


def check_pooled(
    backend: Backend, case: PoolCase, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    """Run every check of a `pooled_attention` backend.

    Raises:
        AssertionError: If one of them fails.
    """
    q, k, v = random_qkv(case, dtype=dtype, device=device)
    options = case.options(device, return_lse=True)
    out, target, lse = backend.run(q, k, v, case.block_size, options)
    by_reference: Callable[..., Any] = pooled_reference.run
    for which, result in ((0, out), (2, lse)):
        budget = Budget.of(
            lambda q, k, v, i=which: by_reference(q, k, v, case.block_size, options)[i], q, k, v
        )
        budget.check(result)
    if not case.lengths and case.softcap is None and not case.sinks:
        Budget.of(lambda q, k, v: dense_attention(q, k, v, scale=options.scale), q, k, v).check(out)
    by_definition = Budget.of(lambda q, k: slow_pooled_map(q, k, case.block_size, options).float(), q, k)
    by_definition.check(target)
    ones = torch.ones(target.shape[:3], dtype=torch.float64, device=device)
    Budget(ones, torch.float32, torch.finfo(torch.float32).eps * target.shape[-1]).check(target.sum(-1))
    nothing, alone, _ = backend.run(q, k, None, case.block_size, options)
    assert nothing is None, "without v there is no output"
    # Not the same to the bit: without the second product a compiler may order the first one's sums anew.
    by_definition.check(alone)
    again = backend.run(q, k, v, case.block_size, case.options(device))
    assert torch.equal(again[0], out), "two runs differ in the output, or return_lse changes it"
    assert torch.equal(again[1], target), "two runs differ in the map, or return_lse changes it"
    assert again[2] is None, "lse was not asked for"
