"""The Hopper kernel: every head dimension, dtype, block size, length and option that it claims."""

from dataclasses import replace

import pytest
import torch

from seerattention.ops import block_sparse_attention as op
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.shapes import Shape
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.poison import poison
from seerattention.testing.waiting import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

BLOCKS = [(64, 64), (128, 128), (64, 128), (128, 64), (256, 64)]
#: (queries, keys): odd lengths, whole and later chunks, aligned to blocks or not, one token.
LENGTHS = [
    (1, 1),
    (63, 63),
    (65, 65),
    (1000, 1000),
    (2048, 2048),
    (100, 420),
    (77, 301),
    (1, 500),
    (513, 2048),
]


def shape_of(queries, keys, block=(64, 64), dim=128, heads=8, kv_heads=2, batch=1):
    return Shape(
        name="",
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=dim,
        block_size=block,
        batch=batch,
    )


def check(shape, dtype=torch.bfloat16, density=0.3, heads=None, batch=None, **options):
    selection = random_selection(shape, density=density, heads=heads, batch=batch, device="cuda")
    qkv = random_qkv(shape, dtype=dtype, device="cuda")
    budget = Budget.of(
        lambda q, k, v: block_sparse_attention(q, k, v, selection, backend="reference", **options), *qkv
    )
    out = block_sparse_attention(*qkv, selection, backend="hopper", **options)
    budget.check(out)
    again = block_sparse_attention(*qkv, selection, backend="hopper", **options)
    assert torch.equal(out, again), "two runs differ"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_and_blocks(lengths, block):
    check(shape_of(*lengths, block))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
def test_head_dimensions_and_dtypes(dim, dtype, block):
    check(shape_of(777, 777, block, dim), dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (6, 2)])
def test_groups_and_batch(heads, kv_heads):
    check(shape_of(300, 300, heads=heads, kv_heads=kv_heads, batch=3))


@pytest.mark.parametrize("selection_heads", [1, 2, 8])
@pytest.mark.parametrize("selection_batch", [1, 2])
def test_shared_selections(selection_heads, selection_batch):
    check(shape_of(500, 500, batch=2), heads=selection_heads, batch=selection_batch)


#: (query heads, KV heads, lists): in the first two neighbouring heads share a ring, in the last they may not.
SHARED_LISTS = [(8, 4, 4), (8, 2, 2), (16, 2, 2), (8, 1, 1), (6, 1, 1), (8, 4, 1), (8, 2, 1)]
LONE_LISTS = [(6, 2, 2), (6, 2, 1), (10, 2, 2), (4, 4, 1)]


@pytest.mark.parametrize(("heads", "kv_heads", "lists"), SHARED_LISTS + LONE_LISTS)
@pytest.mark.parametrize("lengths", [(1, 1), (65, 65), (1000, 1000), (77, 301), (513, 2048)])
def test_lists_of_several_heads(heads, kv_heads, lists, lengths):
    shape = shape_of(*lengths, heads=heads, kv_heads=kv_heads, batch=2)
    check(shape, heads=lists, batch=1)
    check(shape, heads=lists, sinks=torch.linspace(-2, 3, heads, device="cuda"))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(64, 64), (64, 128), (192, 64)])
def test_lists_of_several_heads_in_every_head_dimension_and_dtype(dim, dtype, block):
    check(shape_of(777, 777, block, dim), dtype, heads=2)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("lists", [1, 2])
def test_lists_of_several_heads_are_read_as_lists_of_each(lists, density):
    # With a list each, heads do not share a ring; what is computed is the same in the same order.
    shape = shape_of(1500, 2900)
    selection = random_selection(shape, density=density, heads=lists, device="cuda")
    bits = selection.bits.repeat_interleave(shape.heads // lists, 1)
    apart = replace(selection, bits=bits, shape=(1, shape.heads, *selection.shape[2:]))
    qkv = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    options = {"backend": "hopper", "return_lse": True, "sinks": torch.linspace(-2, 3, 8, device="cuda")}
    for found, expected in zip(
        block_sparse_attention(*qkv, selection, **options),
        block_sparse_attention(*qkv, apart, **options),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
def test_densities(density, block):
    check(shape_of(4096, 4096, block, heads=2, kv_heads=1), density=density)


@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
def test_sinks(block):
    check(shape_of(700, 700, block), sinks=torch.linspace(-2, 3, 8, device="cuda"))


@pytest.mark.parametrize(("block", "lists"), [((64, 64), 8), ((64, 64), 2), ((128, 64), 8)])
def test_lse(block, lists):
    shape = shape_of(700, 900, block)
    selection = random_selection(shape, density=0.3, heads=lists, device="cuda")
    qkv = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    budget = Budget.of(
        lambda q, k, v: block_sparse_attention(q, k, v, selection, backend="reference", return_lse=True)[1],
        *qkv,
    )
    budget.check(block_sparse_attention(*qkv, selection, backend="hopper", return_lse=True)[1])


def test_bits_and_sinks_that_are_views():
    shape = shape_of(500, 500)
    selection = random_selection(shape, density=0.3, device="cuda")
    qkv = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    sinks = torch.linspace(-2, 3, 8, device="cuda")
    expected = block_sparse_attention(*qkv, selection, backend="hopper", sinks=sinks)
    apart = torch.stack([selection.bits, selection.bits + 1], -1)[..., 0]
    scattered = replace(selection, bits=apart)
    assert not scattered.bits.is_contiguous()
    found = block_sparse_attention(*qkv, scattered, backend="hopper", sinks=sinks.repeat_interleave(2)[::2])
    assert torch.equal(expected, found)


def test_views_are_read_by_their_strides():
    shape = shape_of(500, 500)
    selection = random_selection(shape, density=0.3, device="cuda")
    qkv = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    expected = block_sparse_attention(*qkv, selection, backend="hopper")
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    assert torch.equal(expected, block_sparse_attention(*views, selection, backend="hopper"))


@pytest.mark.parametrize(("block", "heads"), [((64, 64), 2), ((64, 64), 4), ((128, 128), 2)])
def test_unselected_keys_and_values_are_never_read(block, heads):
    shape = shape_of(512, 2048, block, heads=heads, kv_heads=2)
    q, k, v = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    selection = random_selection(shape, density=0.1, heads=2, device="cuda")
    before = block_sparse_attention(q, k, v, selection, backend="hopper")
    poisoned = poison(k, v, selection)
    assert bool(poisoned[0].isnan().any()), "every block is read; nothing would be tested"
    assert torch.equal(before, block_sparse_attention(q, *poisoned, selection, backend="hopper"))


def test_compiles_into_one_graph():
    shape = shape_of(300, 300)
    selection = random_selection(shape, density=0.3, device="cuda")
    qkv = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(lambda q, k, v: block_sparse_attention(q, k, v, selection) * 2, fullgraph=True)
    assert torch.equal(compiled(*qkv), block_sparse_attention(*qkv, selection, backend="hopper") * 2)


@pytest.mark.parametrize(
    ("shape", "lists"),
    [
        (shape_of(513, 2048), 8),
        (shape_of(700, 900), 8),
        (shape_of(2048, 2048), 8),
        (shape_of(1024, 1024, (128, 128), heads=32, kv_heads=8), 32),
        (shape_of(513, 2048), 2),
        (shape_of(700, 900), 1),
        (shape_of(1024, 1024, heads=32, kv_heads=8), 8),
    ],
    ids=lambda x: f"{x.queries}-{x.keys}-{x.block_size[0]}" if isinstance(x, Shape) else str(x),
)
def test_many_calls_agree(shape, lists):
    # Of a race between a copy and the reads before it, single calls may see nothing.
    selection = random_selection(shape, density=0.5, heads=lists, device="cuda")
    qkv = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    budget = Budget.of(lambda q, k, v: block_sparse_attention(q, k, v, selection, backend="reference"), *qkv)
    first = block_sparse_attention(*qkv, selection, backend="hopper")
    budget.check(first)
    differing = sum(
        (block_sparse_attention(*qkv, selection, backend="hopper") != first).any() for _ in range(500)
    )
    assert int(differing) == 0, f"{int(differing)} of 500 calls differ"


def test_auto_takes_it():
    shape = shape_of(300, 300)
    selection = random_selection(shape, density=0.3, device="cuda")
    q, k, v = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    options = op.Options.of(q, k)
    assert (
        op.choose(op.BACKENDS, op.ORDER, "auto", q=q, k=k, v=v, selection=selection, options=options)
        is (op.BACKENDS["hopper"])
    )


def test_never_waits_for_the_device():
    shape = shape_of(2048, 2048)
    selection = random_selection(shape, density=0.3, device="cuda")
    qkv = random_qkv(shape, dtype=torch.bfloat16, device="cuda")
    block_sparse_attention(*qkv, selection, backend="hopper")
    with no_waiting():
        block_sparse_attention(*qkv, selection, backend="hopper")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "bfloat16 and float16"),
        (
            lambda q, k, v: tuple(x[..., :96].contiguous() for x in (q, k, v)),
            r"head_dim must be one of \(64, 128\)",
        ),
        (
            lambda q, k, v: (
                torch.empty(q.shape[0], q.shape[1], q.shape[2], 132, dtype=q.dtype, device="cuda")[..., :128],
                k,
                v,
            ),
            "16-byte aligned",
        ),
    ],
)
def test_reasons(change, reason):
    shape = shape_of(300, 300)
    selection = random_selection(shape, density=0.3, device="cuda")
    qkv = change(*random_qkv(shape, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(NotImplementedError, match=reason):
        block_sparse_attention(*qkv, selection, backend="hopper")
