from __future__ import annotations

from types import ModuleType

import pytest
import torch

from seerattention import pooled_attention
from seerattention.ops._shapes import Shape
from seerattention.ops.pooled_attention import BACKENDS, chunked, pooled_map
from seerattention.ops.pooled_attention._cases import CASES
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv
from seerattention.testing.memory import LargestTensor

SMALL = [case for case in CASES if not case.large]
by_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@by_backend
@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conforms(backend: ModuleType, case: Shape, dtype: torch.dtype) -> None:
    conformance.check_pooled(backend, case, dtype)


@by_backend
def test_future_blocks_have_no_share(backend: ModuleType) -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=300, keys=300, head_dim=64))
    _, target = backend.run(q, k, v, (64, 64), scale=0.125)
    assert (target.triu(1) == 0).all()
    assert (target.diagonal(dim1=2, dim2=3) > 0).all()


@by_backend
def test_later_chunk_is_the_end_of_the_whole(backend: ModuleType) -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=300, keys=300, head_dim=64))
    out, target = backend.run(q, k, v, (64, 64), scale=0.125)
    late_out, late_target = backend.run(q[:, :, 128:], k, v, (64, 64), scale=0.125)
    torch.testing.assert_close(late_out, out[:, :, 128:])
    torch.testing.assert_close(late_target, target[:, :, 2:])


@pytest.mark.parametrize("size", [1, 100_000, 3_000_000])
def test_chunked_in_smaller_slices(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(chunked, "WORK_BYTES", size)
    for case in SMALL:
        conformance.check_pooled(chunked, case)


@pytest.mark.parametrize("block_size", [(64, 64), (16, 16), (128, 64)])
@pytest.mark.parametrize("queries", [4096, 1000])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_chunked_stays_within_its_budget(block_size: tuple[int, int], queries: int, kv_heads: int) -> None:
    shape = Shape(name="", heads=2, kv_heads=kv_heads, queries=queries, keys=4096, head_dim=64)
    q, k, v = random_qkv(shape)
    with LargestTensor() as largest:
        chunked.run(q, k, v, block_size, scale=0.125)
    assert 4 * 4096 * 4096 > chunked.WORK_BYTES >= largest.bytes > chunked.WORK_BYTES // 2


def test_public_functions() -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=100, keys=130, head_dim=64)
    q, k, v = (x.requires_grad_() for x in random_qkv(shape))
    out, target = pooled_attention(q, k, v, (64, 64))
    assert not out.requires_grad
    assert not target.requires_grad
    assert torch.equal(pooled_map(q, k, (64, 64)), target)
    expected = chunked.run(q.detach(), k.detach(), v.detach(), (64, 64), scale=64**-0.5)
    assert torch.equal(out, expected[0])
    assert torch.equal(target, expected[1])
    assert not torch.equal(pooled_map(q, k, (64, 64), scale=0.5), target)


@pytest.mark.parametrize("block_size", [(0, 64), (64, 0), (-1, 64)])
def test_block_size_must_be_positive(block_size: tuple[int, int]) -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=10, keys=10, head_dim=8))
    with pytest.raises(ValueError, match="block sizes must be at least one token, got"):
        pooled_attention(q, k, v, block_size)
