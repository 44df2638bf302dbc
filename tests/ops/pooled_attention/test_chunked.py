from __future__ import annotations

import pytest
import torch

from seerattention.ops.cases.pooled_attention import CASES
from seerattention.ops.options import PoolOptions
from seerattention.ops.pooled_attention import chunked, pooled_attention
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


@pytest.mark.parametrize("name", ["batch", "packed", "sinks", "mass-group"])
def test_compiled_without_a_break(name: str) -> None:
    case = next(case for case in SMALL if case.name == name)
    qkv, options = random_qkv(case), case.options()
    compiled = torch.compile(pooled_attention, fullgraph=True, backend="aot_eager")
    asked = {"sinks": options.sinks, "rows": options.rows, "return_lse": True}
    asked |= {"per_kv_head": options.per_kv_head, "pool": options.pool}
    plain = pooled_attention(*qkv, case.block_size, **asked)
    for one, other in zip(compiled(*qkv, case.block_size, **asked), plain, strict=True):
        assert torch.equal(one, other)
