"""The compiled kernel of `pooled_attention`; tests/ops runs the same code in the interpreter."""

from dataclasses import replace

import pytest
import torch

from seerattention import pooled_attention
from seerattention.ops.cases.pooled_attention import CASES, PoolCase
from seerattention.ops.launch import Launch
from seerattention.ops.options import POOLS, PoolOptions
from seerattention.ops.pooled_attention import BACKENDS, pooled_map
from seerattention.ops.tma import tiles
from seerattention.testing import conformance
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

kernel, chunked, reference = BACKENDS["triton"], BACKENDS["chunked"], BACKENDS["reference"]
hopper = BACKENDS["hopper"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
by_pool = pytest.mark.parametrize("pool", POOLS)
#: What the kernel takes: float32 has other backends for mass.
TAKEN = [(pool, dtype) for pool in POOLS for dtype in DTYPES if (pool, dtype) != ("mass", torch.float32)]
by_pool_and_dtype = pytest.mark.parametrize(("pool", "dtype"), TAKEN)
BY_NAME = {case.name: case for case in CASES}
# The kernel has no query blocks of 8.
SMALL = [case for case in CASES if not case.large and case.name != "small-blocks"]
LLAMA = BY_NAME["llama-8b-32k"]


def inputs(case, dtype=torch.bfloat16):
    return random_qkv(case, dtype=dtype, device="cuda")


def check(case, dtype, kernel=kernel):
    """Output, map and lse within the budget, and two runs alike."""
    q, k, v = inputs(case, dtype)
    options = case.options("cuda", return_lse=True)
    results = kernel.run(q, k, v, case.block_size, options)
    again = kernel.run(q, k, v, case.block_size, options)
    for which, (one, other) in enumerate(zip(results, again, strict=True)):
        Budget.of(
            lambda q, k, v, i=which: reference.run(q, k, v, case.block_size, options)[i], q, k, v
        ).check(one)
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in SMALL for dtype in DTYPES if (case.pool, dtype) in TAKEN],
    ids=lambda x: getattr(x, "name", None),
)
def test_conforms(case, dtype):
    conformance.check_pooled(kernel, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_q", kernel.BLOCKS_Q)
@pytest.mark.parametrize("block_k", kernel.BLOCKS_K)
def test_head_dims_and_blocks(head_dim, block_q, block_k, dtype):
    case = PoolCase(
        name="", heads=4, kv_heads=2, queries=300, keys=500, head_dim=head_dim,
        block_size=(block_q, block_k), per_kv_head=block_q in (1, 64),
    )  # fmt: skip
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [(1, 16), (16, 32), (32, 64), (64, 64), (128, 16), (128, 128)])
def test_mass(head_dim, block_size, dtype):
    case = PoolCase(
        name="", heads=4, kv_heads=2, queries=300, keys=500, head_dim=head_dim, block_size=block_size,
        per_kv_head=block_size[0] in (1, 32, 128), sinks=head_dim == 128, pool="mass",
    )  # fmt: skip
    check(case, dtype)


@by_pool_and_dtype
@pytest.mark.parametrize("queries", [1, 2, 15, 63, 64, 65, 127, 129, 257, 1000])
@pytest.mark.parametrize("past", [0, 1, 100, 640])
def test_lengths(queries, past, dtype, pool):
    # Few queries make few numbers, and how far a reference is off in so few is a matter of luck.
    case = PoolCase(
        name="", heads=4, kv_heads=2, queries=queries, keys=queries + past, head_dim=128,
        batch=16 if queries < 16 else 1, pool=pool,
    )  # fmt: skip
    check(case, dtype)


@pytest.mark.parametrize("launch", [
    *(Launch(128, 64, 8, stages, 1, direct=direct) for stages in (2, 3, 4) for direct in (False, True)),
    *(Launch(128, 128, 8, 2, 1, direct=direct) for direct in (False, True)),
    *(Launch(64, 64, 4, stages, 2, direct=direct) for stages in (2, 3) for direct in (False, True)),
], ids=str)  # fmt: skip
@by_pool
def test_launches(monkeypatch, launch, pool):
    # The launches that benchmarks/pooled_attention.py tries.
    monkeypatch.setitem(kernel.LAUNCHES, (2, 128), launch)
    for block_size in ((64, 64), (128, 128), (1, 16)):
        case = PoolCase(
            name="", heads=4, kv_heads=2, queries=700, keys=1000, head_dim=128, block_size=block_size,
            pool=pool,
        )  # fmt: skip
        check(case, torch.bfloat16)


@by_pool
@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("block_size", [(64, 64), (1, 64), (128, 32)])
def test_many_programs_take_many_rows(block_size, per_kv_head, pool):
    # More rows than programs, and tiles whose scratch held another tile's cells before.
    case = PoolCase(
        name="", heads=8, kv_heads=2, queries=6000, keys=6000, head_dim=128, block_size=block_size,
        per_kv_head=per_kv_head, pool=pool,
    )  # fmt: skip
    check(case, torch.bfloat16)


@by_pool_and_dtype
def test_no_sequence_reads_its_neighbours(dtype, pool):
    case = replace(BY_NAME["packed"], pool=pool)
    q, k, v = inputs(case, dtype)
    clean = kernel.run(q, k, v, case.block_size, case.options("cuda"))
    k[:, :, 131:324], v[:, :, 131:324] = torch.nan, torch.nan
    out, target, _ = kernel.run(q, k, v, case.block_size, case.options("cuda"))
    for x, y, first, last in ((out, clean[0], 131, 194), (target, clean[1], 4, 5)):
        assert torch.equal(x[:, :, :first], y[:, :, :first])
        assert torch.equal(x[:, :, last:], y[:, :, last:])
    assert out[:, :, 131:194].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1100, 1000])
def test_later_keys_are_not_read(queries, dtype):
    case = PoolCase(name="", heads=4, kv_heads=2, queries=queries, keys=1100, head_dim=128)
    q, k, v = inputs(case, dtype)
    clean = kernel.run(q, k, v, (64, 64), case.options("cuda"))
    tile = kernel.launch_of(128, queries, dtype.itemsize).block_m
    seen = 512 // tile * tile
    k[:, :, 1100 - queries + seen :], v[:, :, 1100 - queries + seen :] = torch.nan, torch.nan
    out, target, _ = kernel.run(q, k, v, (64, 64), case.options("cuda"))
    assert torch.equal(out[:, :, :seen], clean[0][:, :, :seen])
    assert torch.equal(target[:, :, : seen // 64], clean[1][:, :, : seen // 64])
    assert not out[:, :, :seen].isnan().any()


def test_views_need_no_tma():
    # Strides that are no multiple of 16 bytes go another way than TMA.
    case = BY_NAME["thousand"]
    q, k, v = inputs(case)
    odd = [torch.cat([x, x[..., :1]], -1)[..., :-1] for x in (k, v)]
    assert tiles(Launch(64, 64, 4, 3), 64, *odd) is None
    expected = kernel.run(q, k, v, (64, 64), case.options("cuda"))
    for one, other in zip(kernel.run(q, *odd, (64, 64), case.options("cuda")), expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    model_layout = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for one, other in zip(kernel.run(*model_layout, (64, 64), case.options("cuda")), expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("name", ["thousand", "sinks", "softcap", "decode", "mass-group"])
def test_compiled_without_a_break(name):
    case = BY_NAME[name]
    q, k, v = inputs(case)
    options = case.options("cuda")

    def call(q, k, v):
        out, target, lse = pooled_attention(
            q, k, v, case.block_size, softcap=options.softcap, sinks=options.sinks,
            per_kv_head=options.per_kv_head, pool=options.pool, return_lse=True, backend="triton",
        )  # fmt: skip
        return 2 * out, target, lse

    for one, other in zip(torch.compile(call, fullgraph=True)(q, k, v), call(q, k, v), strict=True):
        assert torch.equal(one, other)


@by_pool
def test_auto_takes_it(monkeypatch, pool):
    monkeypatch.setattr(chunked, "run", None)
    q, k, v = inputs(BY_NAME["thousand"])
    pooled_attention(q, k, v, (64, 64), pool=pool)


def test_nothing_waits_for_the_device():
    q, k, v = inputs(BY_NAME["thousand"])
    kernel.run(q, k, v, (64, 64), PoolOptions.of(q, k))
    with no_waiting():
        kernel.run(q, k, v, (64, 64), PoolOptions.of(q, k))


def bytes_beyond_outputs(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    kept = sum(x.nbytes for x in (results if isinstance(results, tuple) else (results,)) if x is not None)
    return torch.cuda.max_memory_allocated() - before - kept


@pytest.mark.parametrize(("tokens", "limit"), [(32768, 64e6), (131072, 1e9)])
@pytest.mark.parametrize(
    ("block_size", "per_kv_head"), [((64, 64), False), ((64, 64), True), ((1, 64), True)]
)
def test_memory_is_bounded(tokens, limit, block_size, per_kv_head):
    case = replace(LLAMA, queries=tokens, keys=tokens)
    q, k, v = inputs(case)
    run = lambda: pooled_attention(q, k, v, block_size, per_kv_head=per_kv_head, backend="triton")  # noqa: E731
    assert bytes_beyond_outputs(run) <= limit
    assert bytes_beyond_outputs(lambda: pooled_map(q, k, block_size, per_kv_head=per_kv_head)) <= limit


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
class TestHopper:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("block_size", [(64, 64), (128, 128), (64, 128), (128, 64), (256, 64)])
    @pytest.mark.parametrize("per_kv_head", [False, True])
    def test_blocks_and_options(self, head_dim, block_size, per_kv_head, dtype):
        case = PoolCase(
            name="", heads=4, kv_heads=2, queries=300, keys=500, head_dim=head_dim, batch=2,
            block_size=block_size, per_kv_head=per_kv_head, sinks=per_kv_head,
        )  # fmt: skip
        check(case, dtype, hopper)

    @pytest.mark.parametrize("queries", [1, 2, 15, 63, 64, 65, 127, 128, 129, 257, 1000, 4097])
    @pytest.mark.parametrize("past", [0, 1, 100, 640])
    def test_lengths(self, queries, past):
        case = PoolCase(name="", heads=8, kv_heads=2, queries=queries, keys=queries + past, head_dim=128)
        check(case, torch.bfloat16, hopper)

    def test_many_calls_agree(self):
        case = PoolCase(name="", heads=8, kv_heads=2, queries=6000, keys=6000, head_dim=128)
        q, k, v = inputs(case)
        first = hopper.run(q, k, v, (64, 64), case.options("cuda"))
        for _ in range(200):
            again = hopper.run(q, k, v, (64, 64), case.options("cuda"))
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])

    @pytest.mark.parametrize("past", [0, 100])
    def test_later_keys_are_not_read(self, past):
        case = PoolCase(name="", heads=4, kv_heads=2, queries=1000, keys=1000 + past, head_dim=128)
        q, k, v = inputs(case)
        clean = hopper.run(q, k, v, (64, 64), case.options("cuda"))
        # What a tile of 128 queries may not see, its copies do not bring.
        k[:, :, past + 576 :], v[:, :, past + 576 :] = torch.nan, torch.nan
        out, target, _ = hopper.run(q, k, v, (64, 64), case.options("cuda"))
        assert torch.equal(out[:, :, :384], clean[0][:, :, :384])
        assert torch.equal(target[:, :, :6], clean[1][:, :, :6])

    def test_compiled_without_a_break(self):
        case = PoolCase(name="", heads=4, kv_heads=2, queries=300, keys=500, head_dim=128)
        q, k, v = inputs(case)
        call = lambda q, k, v: pooled_attention(q, k, v, (128, 64), return_lse=True, backend="hopper")  # noqa: E731
        out, _, lse = call(q, k, v)
        compiled = torch.compile(call, fullgraph=True)(q, k, v)
        assert torch.equal(compiled[0], out)
        assert torch.equal(compiled[2], lse)
        # A compiler may add a row's shares in another order.
        options = replace(case, block_size=(128, 64)).options("cuda", return_lse=True)
        Budget.of(lambda q, k, v: reference.run(q, k, v, (128, 64), options)[1], q, k, v).check(compiled[1])

    @pytest.mark.parametrize(("tokens", "limit"), [(32768, 64e6), (131072, 1e9)])
    @pytest.mark.parametrize(("block_size", "per_kv_head"), [((64, 64), False), ((128, 128), False)])
    def test_memory_is_bounded(self, tokens, limit, block_size, per_kv_head):
        q, k, v = inputs(replace(LLAMA, queries=tokens, keys=tokens))
        run = lambda: pooled_attention(q, k, v, block_size, per_kv_head=per_kv_head, backend="hopper")  # noqa: E731
        assert bytes_beyond_outputs(run) <= limit
