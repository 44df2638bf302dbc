"""What a watch sees of attention calls."""

from __future__ import annotations

import pytest
import torch

from seerattention import BlockSelection, causal_blocks
from seerattention.engine.call import Given
from seerattention.hosts.transformers import AttentionCall
from seerattention.measure.observe import Watch
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing.conformance import dense_weights
from seerattention.testing.inputs import random_qkv, random_selection


def call_of(shape: Shape) -> AttentionCall:
    q, k, v = random_qkv(shape)
    given = Given(q, k, v, q, k[:, :, -shape.queries :])
    return AttentionCall(0, given, Rows.last(shape.queries, shape.keys), 0.5)


@pytest.mark.parametrize("queries", [300, 100])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_watch_sees_density_and_recall(queries: int, heads: int) -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=queries, keys=300, head_dim=16, batch=2)
    call = call_of(shape)
    selection = random_selection(shape, density=0.3, heads=heads)
    watch = Watch(rows=queries)
    watch(0, call, selection)
    valid = causal_blocks(queries, 300, (64, 64))
    assert watch.density == pytest.approx(selection.density(valid))
    share = dense_weights(call.q, call.k, scale=0.5)
    read = selection.to_mask().repeat_interleave(4 // heads, 1)
    read = read.repeat_interleave(64, 2)[:, :, :queries].repeat_interleave(64, 3)[..., :300]
    recall = float((share * read).sum(-1).mean())
    assert watch.recall == pytest.approx(recall)
    assert 0.1 < recall < 0.99
    full = BlockSelection.full(Rows.last(queries, 300), (64, 64))
    watch(1, call, BlockSelection.from_mask(full.to_mask().expand(2, 4, -1, -1), (64, 64)))
    assert watch.recall == pytest.approx((recall + 1) / 2)


def test_watch_without_rows_and_without_calls() -> None:
    watch = Watch()
    assert (watch.density, watch.recall) == (1, 1)
    shape = Shape(name="", heads=4, kv_heads=2, queries=300, keys=300, head_dim=16)
    watch(0, call_of(shape), random_selection(shape, density=0.0))
    assert watch.density == 5 / 15
    assert watch.recall == 1


def test_watch_sees_every_sequence_of_a_pack() -> None:
    lengths = [(40, 100), (300, 300), (1, 65)]
    rows = Rows.packed(lengths)
    shape = Shape(name="", heads=2, kv_heads=1, queries=341, keys=465, head_dim=16, lengths=tuple(lengths))
    q, k, v = random_qkv(shape)
    valid = rows.causal((64, 64))
    mask = (torch.rand(1, 2, *valid.shape) < 0.5) & valid | rows.own((64, 64))
    watch = Watch(rows=4)
    call = AttentionCall(0, Given(q, k, v, q, k), rows, 0.5)
    watch(0, call, BlockSelection.from_mask(mask, (64, 64)))
    assert watch.density == pytest.approx(float(mask.sum() / (2 * valid.sum())))
    alone, row = [], 0
    for one in rows.sequences():
        down, across = one.rows.num_blocks((64, 64))
        own = BlockSelection.from_mask(mask[:, :, row : row + down, :across].contiguous(), (64, 64))
        tensors = Given(q[:, :, one.queries], k[:, :, one.keys], v[:, :, one.keys], q, k)
        part = Watch(rows=4)
        part(0, AttentionCall(0, tensors, one.rows, 0.5), own)
        alone.append(part.recall)
        row += down
    assert watch.recall == pytest.approx(sum(alone) / 3)
