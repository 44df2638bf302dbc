"""Summaries and choices on a CPU, compiled to stop at wrong reads and writes and at undefined behaviour.

``make test-native`` runs this file.
"""

from __future__ import annotations

import pytest
import torch

from seerattention import TopK, TopP
from seerattention.ops.cases import score_blocks, summarise_blocks
from seerattention.ops.cases.select_blocks import CASES, Case
from seerattention.ops.score_blocks import score_blocks as score
from seerattention.ops.summarise_blocks import summarise_blocks as summarise
from seerattention.testing.choices import POLICIES, check_choice, check_packed_choice
from seerattention.testing.summaries import inputs

pytestmark = pytest.mark.usefixtures("sanitized")

SMALL = [case for case in CASES if not case.large]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("threads", [1, 3])
@by_dtype
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_chooses(case: Case, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    check_choice(case, TopK(0.3), "native", dtype)
    check_choice(case, TopP(0.5, local_blocks=99, sink_blocks=99), "native", dtype)
    if case.lengths:
        check_packed_choice(case, TopP(0.5), "native")
    torch.set_num_threads(before)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies(policy: TopK) -> None:
    check_choice(SMALL[6], policy, "native")


@by_dtype
@pytest.mark.parametrize("case", [c for c in score_blocks.CASES if not c.large], ids=lambda case: case.name)
def test_scores(case: score_blocks.Case, dtype: torch.dtype) -> None:
    q, k, _ = case.normal(dtype)
    for shares in (False, True):
        score(q, k, case.sub_blocks, **case.geometry, shares=shares, backend="native")


@by_dtype
@pytest.mark.parametrize("case", summarise_blocks.CASES, ids=lambda case: case.name)
def test_summarises(case: summarise_blocks.Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    summarise(given.pop("x"), case.size, case.pools, **given, backend="native")
