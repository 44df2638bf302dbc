"""The benchmark's selections: their density, and a trained gate's scores laid out for a longer text."""

import pytest
import torch

from seerattention.bench import masks
from seerattention.ops.shapes import Shape
from seerattention.policies import TopK
from seerattention.selection import causal_blocks


def shape(tokens, block=16, heads=4, kv_heads=2):
    return Shape(
        name="",
        heads=heads,
        kv_heads=kv_heads,
        queries=tokens,
        keys=tokens,
        head_dim=16,
        block_size=(block, block),
    )


@pytest.mark.parametrize("mask", masks.MASKS)
@pytest.mark.parametrize("tokens", [16 * 64, 16 * 64 - 5])
def test_masks_have_the_density_asked_for(mask, tokens):
    sizes = shape(tokens)
    scores = torch.randn(3, 3, 24, 24)
    made = {
        "random": lambda: masks.random(sizes, 0.2, "cpu"),
        "group": lambda: masks.group(sizes, 0.2, "cpu"),
        "band": lambda: masks.band(sizes, 0.2, "cpu"),
        "gate": lambda: masks.gate(sizes, 0.2, "cpu", scores),
    }[mask]()
    # A list per KV head, of which there are two, or per query head.
    assert made.shape == (1, 2 if mask == "group" else 4, 64, 64)
    valid = causal_blocks(tokens, tokens, (16, 16))
    if mask in ("random", "group"):
        # Own and first block come on top: two of on average 32.
        assert 0.2 - 1 / 64 <= made.density(valid) <= 0.2 + 2 / 32
    else:
        assert made.density(valid) == pytest.approx(TopK(0.2).expected_density(64, 16), rel=1e-12)
    chosen = made.to_mask()
    assert not (chosen & ~valid).any()
    assert chosen[..., 0].all()
    assert chosen.diagonal(dim1=-2, dim2=-1).all()


def test_full_mask():
    assert torch.equal(masks.full(shape(100), "cpu").to_mask()[0, 3], causal_blocks(100, 100, (16, 16)))


def test_heads_of_a_group_stay_together():
    # The teacher: 8 layers of 2 groups of 3 heads. Wanted: 8 groups of 4.
    picked = masks.pick_heads(16, 3, 8, 4)
    assert len(set(picked)) == 32
    for group in range(8):
        own, other = 2 * group, 2 * group + 1
        assert picked[4 * group : 4 * group + 4] == [(own, 0), (own, 1), (own, 2), (other, 0)]
    assert len(masks.pick_heads(2, 3, 4, 2)) == 8


def test_a_longer_layout_keeps_what_is_near_and_the_first_block():
    known, blocks = 16, 100
    scores = torch.randn(known, known)
    longer = masks.lay_out(scores, blocks, seed=0)
    assert longer.shape == (blocks, blocks)
    assert torch.equal(longer[:known, :known].tril(), scores.tril())
    for row in range(known, blocks):
        source = known // 2 + (row - known) % (known // 2)
        assert longer[row, 0] == scores[source, 0]
        for distance in range(known // 2):
            assert longer[row, row - distance] == scores[source, source - distance]
    assert longer.isfinite().all()
    # Far passages repeat a row's early keys up to one amount per passage.
    period = known // 2 - 1
    first, second = longer[90, 1 : 1 + period], longer[90, 1 + period : 1 + 2 * period]
    early = scores[known // 2 + (90 - known) % 8, 1 : 1 + period]
    for repeated in (first, second):
        assert torch.allclose(repeated - repeated[0], early - early[0], atol=1e-5)
    assert first[0] != second[0]
    assert torch.equal(masks.lay_out(scores, 5, seed=0), scores[:5, :5])


def test_larger_blocks_take_their_best_part():
    scores = torch.arange(16.0).view(1, 1, 4, 4)
    coarse = masks._coarser(scores, 2)
    # Acausal parts do not count: row 1, column 1 holds 15 but row 0 column 0 only 0, 4 and 5.
    assert coarse[0, 0, 0, 0] == 5
    assert coarse[0, 0, 1].tolist() == [13, 15]


def test_teacher_scores():
    scores = masks.teacher_scores("cpu", 256)
    assert scores.shape == (16, 3, 4, 4)
    selection = masks.gate(shape(64 * 40, 64, heads=32, kv_heads=8), 0.2, "cpu", scores.repeat(1, 1, 3, 3))
    assert selection.shape == (1, 32, 40, 40)
    assert int(selection.counts.max()) == TopK(0.2).blocks(40)
