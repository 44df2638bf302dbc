from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from seerattention import pooled_attention
from seerattention.ops.cases.pooled_attention import CASES, PoolCase
from seerattention.ops.options import PoolOptions
from seerattention.ops.pooled_attention import BACKENDS, chunked, pooled_map
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv

SMALL = [case for case in CASES if not case.large]
BY_NAME = {case.name: case for case in CASES}
#: The Triton kernel is interpreted in a process of its own, test_triton.py; Hopper's needs its GPU.
ON_CPU = {name: backend for name, backend in BACKENDS.items() if name not in ("triton", "hopper")}
by_backend = pytest.mark.parametrize("backend", ON_CPU.values(), ids=ON_CPU)


@by_backend
@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conforms(backend: ModuleType, case: PoolCase, dtype: torch.dtype) -> None:
    conformance.check_pooled(backend, case, dtype)


@by_backend
def test_future_blocks_have_no_share(backend: ModuleType) -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=300, keys=300, head_dim=64))
    _, target, _ = backend.run(q, k, v, (64, 64), PoolOptions.of(q, k))
    assert (target.triu(1) == 0).all()
    assert (target.diagonal(dim1=2, dim2=3) > 0).all()


@by_backend
def test_later_chunk_is_the_end_of_the_whole(backend: ModuleType) -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=300, keys=300, head_dim=64))
    out, target, _ = backend.run(q, k, v, (64, 64), PoolOptions.of(q, k))
    late = q[:, :, 128:]
    late_out, late_target, _ = backend.run(late, k, v, (64, 64), PoolOptions.of(late, k))
    torch.testing.assert_close(late_out, out[:, :, 128:])
    torch.testing.assert_close(late_target, target[:, :, 2:])


def test_public_functions() -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=100, keys=130, head_dim=64)
    q, k, v = (x.requires_grad_() for x in random_qkv(shape))
    out, target, _ = pooled_attention(q, k, v, (64, 64))
    assert not out.requires_grad
    assert not target.requires_grad
    assert torch.equal(pooled_map(q, k, (64, 64)), target)
    assert pooled_attention(q, k, v, (64, 64)).lse is None
    options = PoolOptions.of(q, k, return_lse=True)
    expected = chunked.run(q.detach(), k.detach(), v.detach(), (64, 64), options)
    for result in ((out, target), pooled_attention(q, k, v, (64, 64), return_lse=True)):
        for one, other in zip(result, expected, strict=False):
            assert other is not None
            assert torch.equal(one, other)
    assert not torch.equal(pooled_map(q, k, (64, 64), scale=0.5), target)


@pytest.mark.parametrize("block_size", [(0, 64), (64, 0), (-1, 64)])
def test_block_size_must_be_positive(block_size: tuple[int, int]) -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=10, keys=10, head_dim=8))
    with pytest.raises(ValueError, match="block sizes must be at least one token, got"):
        pooled_attention(q, k, v, block_size)


@by_backend
def test_one_map_per_kv_head_is_the_largest_weight_of_its_group(backend: ModuleType) -> None:
    case = BY_NAME["decode"]
    q, k, v = random_qkv(case)
    out, target, _ = backend.run(q, k, v, case.block_size, case.options())
    weights = conformance.dense_weights(q, k, scale=case.head_dim**-0.5)
    padded = torch.nn.functional.pad(weights, (0, -case.keys % 32)).unflatten(-1, (-1, 32)).amax(-1)
    merged = padded.unflatten(1, (2, 3)).amax(2)
    torch.testing.assert_close(target, merged / merged.sum(-1, keepdim=True))
    alone = backend.run(q, k, v, case.block_size, replace(case.options(), per_kv_head=False))
    assert torch.equal(alone[0], out)


@by_backend
@pytest.mark.parametrize("block_size", [(64, 64), (8, 24), (7, 5), (1, 16), (200, 300)])
def test_mass_is_the_most_that_a_query_of_a_row_gives_a_block(
    backend: ModuleType, block_size: tuple[int, int]
) -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=90, keys=130, head_dim=64))
    _, target, _ = backend.run(q, k, v, block_size, PoolOptions.of(q, k, pool="mass"))
    weights = conformance.dense_weights(q.double(), k.double(), scale=0.125)
    blocks = torch.stack([keys.sum(-1) for keys in weights.split(block_size[1], 3)], 3)
    rows = torch.stack([queries.amax(2) for queries in blocks.split(block_size[0], 2)], 2)
    torch.testing.assert_close(target, (rows / rows.sum(-1, keepdim=True)).float())


@by_backend
def test_the_mass_of_a_group_is_that_of_the_head_with_the_most(backend: ModuleType) -> None:
    q, k, v = random_qkv(Shape(name="", heads=6, kv_heads=2, queries=90, keys=130, head_dim=64))
    heads, group = (
        backend.run(q, k, v, (1, 16), PoolOptions.of(q, k, pool="mass", per_kv_head=per_kv_head))[1]
        for per_kv_head in (False, True)
    )
    # Rows of one query sum to 1 as they are.
    most = heads.unflatten(1, (2, 3)).amax(2)
    torch.testing.assert_close(group, most / most.sum(-1, keepdim=True))


def test_an_unknown_pool_names_the_known_ones() -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=10, keys=10, head_dim=8))
    unknown: Any = "sum"
    with pytest.raises(ValueError, match="pool must be max or mass, got 'sum'"):
        pooled_attention(q, k, v, (4, 4), pool=unknown)


@pytest.mark.parametrize("name", ["softcap", "sinks", "group", "packed", "packed-decode", "mass-group"])
def test_options_reach_the_backend(name: str) -> None:
    case = BY_NAME[name]
    q, k, v = random_qkv(case)
    options = case.options()
    given: dict[str, Any] = {
        "softcap": options.softcap,
        "sinks": options.sinks,
        "per_kv_head": options.per_kv_head,
        "pool": options.pool,
        "rows": options.rows,
    }
    out, target, _ = pooled_attention(q, k, v, case.block_size, **given)
    expected = chunked.run(q, k, v, case.block_size, options)
    assert expected[0] is not None
    assert torch.equal(out, expected[0])
    assert torch.equal(target, expected[1])
    assert torch.equal(pooled_map(q, k, case.block_size, **given), target)


@by_backend
def test_packed_sequences_are_as_if_alone(backend: ModuleType) -> None:
    case = BY_NAME["packed"]
    q, k, v = random_qkv(case)
    out, target, lse = backend.run(q, k, v, case.block_size, case.options(return_lse=True))
    start_q, start_k, row = 0, 0, 0
    for queries, keys in case.lengths:
        if queries == 0:
            continue
        one = q[:, :, start_q : start_q + queries], *(x[:, :, start_k : start_k + keys] for x in (k, v))
        options = replace(case.options(return_lse=True), rows=Rows.last(queries, keys))
        alone, its_map, its_lse = backend.run(*one, case.block_size, options)
        rows, columns = its_map.shape[2:]
        torch.testing.assert_close(out[:, :, start_q : start_q + queries], alone)
        torch.testing.assert_close(lse[:, :, start_q : start_q + queries], its_lse)
        torch.testing.assert_close(target[:, :, row : row + rows, :columns], its_map)
        assert (target[:, :, row : row + rows, columns:] == 0).all()
        start_q, start_k, row = start_q + queries, start_k + keys, row + rows
    assert row == target.shape[2]


@pytest.mark.parametrize(
    ("starts_q", "starts_k", "message"),
    [
        ([1, 10], [0, 10], "starts_q must start with 0 and end with the 10 tokens, got 1 to 10"),
        ([0, 10], [0, 9], "starts_k must start with 0 and end with the 10 tokens, got 0 to 9"),
        ([0, 6, 10], [0, 4, 10], "sequence 0 has 6 queries and 4 keys; it needs 0 <= queries <= keys"),
    ],
)
def test_lengths_must_fit(starts_q: list[int], starts_k: list[int], message: str) -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=10, keys=10, head_dim=8))
    rows = Rows.from_starts(torch.tensor(starts_q).int(), torch.tensor(starts_k).int(), 10, 10)
    with pytest.raises(ValueError, match=message):
        pooled_attention(q, k, v, (4, 4), rows=rows)


@by_backend
def test_a_shard_of_a_prompt_sees_no_later_keys(backend: ModuleType) -> None:
    case = BY_NAME["later-chunk"]
    q, k, v = random_qkv(case)
    expected = pooled_attention(q, k, v, (64, 64), backend=backend.__name__.split(".")[-1])
    nothing = torch.full((1, 2, 100, 64), torch.nan)
    k, v = torch.cat([k, nothing], 2), torch.cat([v, nothing], 2)
    rows = Rows.at(case.keys - case.queries, case.queries)
    found = pooled_attention(q, k, v, (64, 64), rows=rows, backend=backend.__name__.split(".")[-1])
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.target, expected.target)
