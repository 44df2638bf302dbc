from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from seerattention.ops.block_sparse_attention import gather, reference
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.ops.cases.pooled_attention import PoolCase
from seerattention.ops.options import POOLS, Pool
from seerattention.ops.pooled_attention import reference as pooled_reference
from seerattention.testing import conformance
from seerattention.testing.mutants import (
    ATTENTION_MUTANTS,
    Mutant,
    Run,
    column_normalised,
    last_rows_only,
    normalised_before_group,
    other_pool,
    shifted_causal_limit,
)

CASE = Case(name="", heads=4, kv_heads=2, queries=150, keys=300, head_dim=32)
RED = {
    "wrong scale": ["matches_reference", "full_is_dense"],
    "dropped last block": ["matches_reference", "full_is_dense", "rows_are_isolated"],
    "swapped head map": ["matches_reference", "full_is_dense"],
    "sees the next key": ["matches_reference", "full_is_dense"],
    "misses its own key": ["matches_reference", "full_is_dense"],
}


def test_what_is_right_passes() -> None:
    for backend in (reference, gather, Mutant(partial(shifted_causal_limit, shift=0), reference)):
        conformance.check_attention(backend, CASE)
    for pool in POOLS:
        case = PoolCase(name="", heads=4, kv_heads=2, queries=150, keys=300, head_dim=32, pool=pool)
        conformance.check_pooled(pooled_reference, case)


@pytest.mark.parametrize("name", ATTENTION_MUTANTS)
def test_attention_checks_notice(name: str) -> None:
    mutant = ATTENTION_MUTANTS[name]
    assert mutant.unsupported(q=None, k=None, v=None, selection=None, options=None) == []
    with pytest.raises(AssertionError):
        conformance.check_attention(mutant, CASE)
    for check in RED[name]:
        run: Callable[[Mutant, Case], None] = getattr(conformance, f"attention_{check}")
        with pytest.raises(AssertionError):
            run(mutant, CASE)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("bug", [column_normalised, last_rows_only, normalised_before_group, other_pool])
def test_pooled_checks_notice(bug: Run, pool: Pool) -> None:
    case = PoolCase(
        name="", heads=4, kv_heads=2, queries=200, head_dim=32, per_kv_head=True, sinks=True, pool=pool
    )
    with pytest.raises(AssertionError):
        conformance.check_pooled(Mutant(bug, pooled_reference), case)
