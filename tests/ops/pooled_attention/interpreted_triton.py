"""The kernel of `pooled_attention` in the interpreter; `tests/ops/test_triton.py` runs this file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seerattention import pooled_attention
from seerattention.ops.cases.pooled_attention import CASES, PoolCase
from seerattention.ops.language import INTERPRETED
from seerattention.ops.launch import Launch
from seerattention.ops.options import POOLS, Pool, PoolOptions
from seerattention.ops.pooled_attention import reference
from seerattention.ops.pooled_attention import triton as backend
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv

# Queries past the end of a sequence have a denominator of 0, whose logarithm the kernel takes on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
a_nan_is_planted = pytest.mark.filterwarnings(
    "ignore:All-NaN slice encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)

by_pool = pytest.mark.parametrize("pool", POOLS)
#: float32 has other backends for mass.
DTYPES: dict[Pool, torch.dtype] = {"max": torch.float32, "mass": torch.float16}

BY_NAME = {case.name: case for case in CASES}
# What these are larger in, a smaller one has as well; the kernel has no query blocks of 8.
SLOW = {"one-token", "thousand", "batch", "wide-128", "wide-256", "later-chunk", "small-blocks", "wide-rows"}
SMALL = [case for case in CASES if not case.large and case.name not in SLOW]
TINY = PoolCase(name="tiny", heads=4, kv_heads=2, queries=37, keys=110, head_dim=32, block_size=(16, 16))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles, several steps and several chunks at the sizes that an interpreter computes."""
    launch = Launch(64, 64, 4, 2, 1)
    monkeypatch.setattr(backend, "LAUNCHES", dict.fromkeys(backend.LAUNCHES, launch))
    monkeypatch.setattr(backend, "CHUNK_CELLS", 4 * 64)
    return


def test_this_is_the_interpreter() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_conforms(case: PoolCase) -> None:
    conformance.check_pooled(backend, case, DTYPES[case.pool])


@pytest.mark.parametrize("name", ["below-block", "decode", "mass-decode"])
def test_half_precision(name: str) -> None:
    conformance.check_pooled(backend, BY_NAME[name], torch.float16)


# Every size once, the smallest and the largest with each other too.
BLOCKS = [(1, 16), (1, 128), (16, 32), (32, 64), (64, 128), (128, 16), (128, 128)]


def test_every_size_of_blocks_is_tested() -> None:
    assert tuple(sorted({q for q, _ in BLOCKS})) == tuple(sorted(backend.BLOCKS_Q))
    assert tuple(sorted({k for _, k in BLOCKS})) == tuple(sorted(backend.BLOCKS_K))


@by_pool
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_blocks(block_q: int, block_k: int, pool: Pool) -> None:
    per_kv_head = block_q in (1, 32) or block_k == 32
    case = replace(TINY, block_size=(block_q, block_k), per_kv_head=per_kv_head, pool=pool)
    conformance.check_pooled(backend, case, DTYPES[pool])


@by_pool
@pytest.mark.parametrize(("block_m", "block_n"), [(128, 16), (16, 128)])
def test_tiles(monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int, pool: Pool) -> None:
    launch = Launch(block_m, block_n, 4, 2, 1)
    monkeypatch.setattr(backend, "LAUNCHES", dict.fromkeys(backend.LAUNCHES, launch))
    for block_size, per_kv_head in (((32, 32), True), ((128, 64), False)):
        case = replace(TINY, queries=70, block_size=block_size, per_kv_head=per_kv_head, pool=pool)
        conformance.check_pooled(backend, case, DTYPES[pool])


@a_nan_is_planted
@by_pool
def test_no_sequence_reads_its_neighbours(pool: Pool) -> None:
    case = replace(BY_NAME["packed"], pool=pool)
    q, k, v = (x.to(DTYPES[pool]) for x in random_qkv(case))
    clean = backend.run(q, k, v, case.block_size, case.options())
    # The third sequence with tokens has 63 queries behind 131 and 193 keys.
    k[:, :, 131:324], v[:, :, 131:324] = torch.nan, torch.nan
    out, target, _ = backend.run(q, k, v, case.block_size, case.options())
    for x, y, first, last in ((out, clean[0], 131, 194), (target, clean[1], 4, 5)):
        assert isinstance(x, Tensor)
        assert isinstance(y, Tensor)
        assert torch.equal(x[:, :, :first], y[:, :, :first])
        assert torch.equal(x[:, :, last:], y[:, :, last:])
    assert isinstance(out, Tensor)
    assert out[:, :, 131:194].isnan().all()


@a_nan_is_planted
def test_later_keys_are_not_read() -> None:
    q, k, v = random_qkv(replace(TINY, queries=110))
    clean = backend.run(q, k, v, (16, 16), PoolOptions.of(q, k))
    k[:, :, 64:], v[:, :, 64:] = torch.nan, torch.nan
    out, target, _ = backend.run(q, k, v, (16, 16), PoolOptions.of(q, k))
    assert out is not None
    assert clean[0] is not None
    assert torch.equal(out[:, :, :64], clean[0][:, :, :64])
    assert torch.equal(target[:, :, :4], clean[1][:, :, :4])


@by_pool
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale: float, pool: Pool) -> None:
    q, k, v = random_qkv(TINY)
    options = PoolOptions.of(q, k, scale=scale, pool=pool)
    out, target, _ = backend.run(q, k, v, (16, 16), options)
    expected = reference.run(q, k, v, (16, 16), options)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(target, expected[1])


def test_mass_of_blocks_whose_weights_are_tiny() -> None:
    # The first keys stand 30 units above the others, or below them: sums of early blocks fade, or late ones.
    q, k, v = (x.half() for x in random_qkv(replace(TINY, pool="mass")))
    options = PoolOptions.of(q, k, pool="mass")
    for sign in (1, -1):
        q[..., 0], k[..., 0] = 16, 0
        k[:, :, :20, 0] = sign * 30 / 16 / options.scale
        _, target, _ = backend.run(q, k, v, (16, 16), options)
        _, expected, _ = reference.run(q.double(), k.double(), v.double(), (16, 16), options)
        assert float(expected.masked_fill(expected == 0, 1).amin()) < 1e-9
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=0)


def test_strides_do_not_matter() -> None:
    q, k, v = random_qkv(TINY)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    wide = torch.cat([v, v], -1)[..., :32]
    expected = backend.run(q, k, v, (16, 16), PoolOptions.of(q, k))
    out, target, _ = backend.run(*strided, wide, (16, 16), PoolOptions.of(q, k))
    assert out is not None
    assert expected[0] is not None
    assert torch.equal(out, expected[0])
    assert torch.equal(target, expected[1])


def test_compiled_without_a_break() -> None:
    q, k, v = (x.half() for x in random_qkv(TINY))

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, target, lse = pooled_attention(q, k, v, (16, 16), pool="mass", return_lse=True, backend="triton")
        return 2 * out, target, lse

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for one, other in zip(compiled(q, k, v), call(q, k, v), strict=True):
        assert torch.equal(one, other)
    op = torch.ops.seerattention.pooled_attention.default
    args = q, k, v, [16, 16], [], 0.2, None, None, None, None, False, "mass", True, backend.__name__
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_reasons_why_not() -> None:
    q, k, v = random_qkv(TINY)
    options = PoolOptions.of(q, k)
    assert backend.unsupported(q, k, v, (16, 16), options) == []

    def why(x: Tensor, block_size: tuple[int, int] = (16, 16)) -> list[str]:
        return backend.unsupported(x, x, x, block_size, options)

    assert why(q.double()) == ["it computes float16, bfloat16 and float32, not float64"]
    assert why(q.bfloat16()) == ["Triton's interpreter multiplies bfloat16 matrices wrongly"]
    assert why(torch.zeros(1, 4, 40, 257)) == ["head_dim must be at most 256, got 257"]
    assert why(q, (8, 24)) == [
        "query blocks must have one of 1, 16, 32, 64, 128 tokens, got 8",
        "KV blocks must have one of 16, 32, 64, 128 tokens, got 24",
    ]
    mass = PoolOptions.of(q, k, pool="mass")
    assert backend.unsupported(q, k, v, (16, 16), mass) == [
        "it rounds the logarithms of sums that float32 takes for mass more than float32 would"
    ]
    assert backend.unsupported(q.half(), k.half(), v.half(), (16, 16), mass) == []
    across = q.mT.contiguous().mT
    assert why(across)[0] == "the last dimension of q must be contiguous, its stride is 37"
    assert why(q.to("meta")) == ["it needs a GPU"]
