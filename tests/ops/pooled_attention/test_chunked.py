from __future__ import annotations

import pytest

from seerattention.ops.cases.pooled_attention import CASES
from seerattention.ops.options import PoolOptions
from seerattention.ops.pooled_attention import chunked
from seerattention.ops.shapes import Shape
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv
from seerattention.testing.memory import LargestTensor

SMALL = [case for case in CASES if not case.large]


@pytest.mark.parametrize("size", [1, 100_000, 3_000_000])
def test_in_smaller_slices(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(chunked, "WORK_BYTES", size)
    for case in SMALL:
        conformance.check_pooled(chunked, case)


@pytest.mark.parametrize("block_size", [(64, 64), (16, 16), (128, 64)])
@pytest.mark.parametrize("queries", [4096, 1000])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_stays_within_its_budget(block_size: tuple[int, int], queries: int, kv_heads: int) -> None:
    shape = Shape(name="", heads=2, kv_heads=kv_heads, queries=queries, keys=4096, head_dim=64)
    q, k, v = random_qkv(shape)
    with LargestTensor() as largest:
        chunked.run(q, k, v, block_size, PoolOptions.of(q, k))
    assert 4 * 4096 * 4096 > chunked.WORK_BYTES >= largest.bytes > chunked.WORK_BYTES // 2
