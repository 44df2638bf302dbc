"""The CPU's kernel, compiled to stop at reads and writes out of bounds and at undefined behaviour.

``make test-native`` runs this file: the sanitizers must be in the process before Python is.
"""

from __future__ import annotations

import pytest
import torch

from seerattention.ops.block_sparse_attention import native
from seerattention.ops.cases.block_sparse_attention import CASES, OPTION_CASES, PAGED_CASES, Case
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.paged import check_paged

SMALL = [case for case in (*CASES, *OPTION_CASES) if not case.large]

pytestmark = pytest.mark.usefixtures("sanitized")


def test_sanitizers_are_in_this_process() -> None:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert "libasan" in maps.read()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_reads_and_writes_what_it_was_given(case: Case, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    conformance.attention_lse_matches_reference(native, case, dtype)
    # As models hand them over: heads after tokens in memory.
    q, k, v = random_qkv(case, dtype=dtype)
    selection = random_selection(case, density=0.3, heads=case.selection_heads)
    tokens_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    native.run(*tokens_first, selection, case.options())
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", PAGED_CASES, ids=[case.name for case in PAGED_CASES])
def test_reads_only_the_pages_of_its_sequences(case: Case, dtype: torch.dtype) -> None:
    check_paged(native, case, dtype)
