import math

import numpy as np
import pytest
import torch

from seerattention.ops.options import POOLS
from seerattention.ops.pooled_attention import pooled_map
from seerattention.rows import Rows
from seerattention.train import target, target_recall
from seerattention.train.objectives.kl import KL
from seerattention.train.target import PREFILL_ROWS, counted, taught_rows


def slow_loss(target, scores):
    """Mean over the last three quarters of the rows of KL(target || softmax over valid blocks)."""
    batch, heads, rows, _ = target.shape
    total, count = 0.0, 0
    for b in range(batch):
        for h in range(heads):
            for i in range(rows // 4, rows):
                exp = [math.exp(s) for s in scores[b, h, i, : i + 1].tolist()]
                for t, e in zip(target[b, h, i, : i + 1].tolist(), exp, strict=True):
                    if t > 0:
                        total += t * math.log(t / (e / sum(exp)))
                count += 1
    return total / count


def loss_of(target, scores, tokens):
    return KL()(*counted(target, scores, (64, 64), tokens))


def target_of(rows, heads=2, zeros=False):
    raw = torch.rand(1, heads, rows, rows).tril()
    if zeros:
        raw = raw * (torch.rand_like(raw) < 0.5) + torch.eye(rows)
    return raw / raw.sum(-1, keepdim=True)


@pytest.mark.parametrize("tokens", [64, 65, 256, 500])
@pytest.mark.parametrize("zeros", [False, True])
def test_loss_is_the_divergence_of_the_later_rows(tokens, zeros):
    rows = -(-tokens // 64)
    target, scores = target_of(rows, zeros=zeros), torch.randn(1, 2, rows, rows)
    loss = loss_of(target.double(), scores.double(), tokens)
    assert float(loss) == pytest.approx(slow_loss(target.double(), scores.double()), rel=1e-12)


def test_loss_is_zero_for_the_target_itself_and_has_finite_gradients():
    target = target_of(8, zeros=True)
    scores = target.log().clamp(min=-1e4).requires_grad_()
    loss = loss_of(target, scores, 512)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=8 * torch.finfo(torch.float32).eps)
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())


def test_acausal_scores_and_early_rows_do_not_count():
    target, scores = target_of(8), torch.randn(1, 2, 8, 8)
    before = loss_of(target, scores, 512)
    changed = scores.clone()
    changed[:, :, ~torch.ones(8, 8, dtype=torch.bool).tril()] = 1e3
    changed[:, :, :2] = torch.randn(1, 2, 2, 8)
    assert torch.equal(loss_of(target, changed, 512), before)


def test_different_shapes_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"per_kv_head=True"):
        loss_of(target_of(4, heads=4), torch.randn(1, 2, 4, 4), 256)


def test_recall_is_the_mass_of_the_best_blocks():
    target = target_of(8)
    # k = floor((1 - sqrt(1 - 0.75)) * 8) = 4: the first, the own, and the best two of the others.
    rows = [target[0, h, i] for h in range(2) for i in range(2, 8)]
    ends = [i for _ in range(2) for i in range(2, 8)]
    best = [
        float(row[0] + row[i] + row[1:i].sort(descending=True).values[:2].sum())
        for row, i in zip(rows, ends, strict=True)
    ]
    recall = target_recall(target, target.log(), (64, 64), 512, 0.75)
    assert recall == pytest.approx(sum(best) / len(best), rel=1e-6)
    assert target_recall(target, -target.log().clamp(min=-100), (64, 64), 512, 0.75) < recall
    # What is read anyway is read whatever its score.
    least = target.log().clone()
    least[..., 0] = -1e9
    assert target_recall(target, least, (64, 64), 512, 0.75) == pytest.approx(recall, rel=1e-6)
    assert target_recall(target, torch.zeros(1, 2, 8, 8), (64, 64), 512, 1.0) == pytest.approx(1)


def qk(tokens, batch=2):
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(batch, heads, tokens, 16, generator=generator).double() for heads in (4, 2))
    return 2 * q, k


def slow_target(q, k, row, size, pool, scale, softcap=None, sinks=None):
    """What one query and the heads of a group give to a finished block, divided by the sum: ``[Hk, n]``."""
    groups, found = len(q) // len(k), []
    for g in range(len(k)):
        heads = []
        for h in range(g * groups, (g + 1) * groups):
            logits = [float(q[h, row] @ k[g, j]) * scale for j in range(row + 1)]
            if softcap is not None:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            total = sum(map(math.exp, logits)) + (0 if sinks is None else math.exp(sinks[h]))
            heads.append([math.exp(x) / total for x in logits])
        blocks = range(0, (row + 1) // size * size, size)
        merge = sum if pool == "mass" else max
        merged = [max(merge(head[start : start + size]) for head in heads) for start in blocks]
        found.append([x / sum(merged) for x in merged])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}])
def test_a_target_of_decoding_is_what_the_group_gives_to_each_finished_block(more, pool, monkeypatch):
    monkeypatch.setattr(target, "WORK_BYTES", {"cpu": 1})
    (q, k), size = qk(70), 16
    rows = torch.tensor([15, 16, 30, 31, 46, 47, 69])
    found = target.decode_target(q, k, rows, size, scale=0.3, pool=pool, **more)
    assert found.shape == (2, 2, 7, 5)
    assert found.dtype == torch.float32
    for b in range(2):
        for i, row in enumerate(rows.tolist()):
            blocks = (row + 1) // size
            expected = slow_target(q[b], k[b], row, size, pool, 0.3, **more)
            torch.testing.assert_close(found[b, :, i, :blocks], expected.float())
            # The block that is being filled is always read, and is no part of it.
            assert not found[b, :, i, blocks:].any()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 0.0])])
def test_a_target_of_decoding_is_that_of_pooled_attention(pool, sinks):
    q, k = qk(200, batch=1)
    rows = target.decode_rows(200)
    whole = pooled_map(q, k, (1, 16), per_kv_head=True, sinks=sinks, pool=pool)[:, :, rows]
    whole = whole.masked_fill(~target.finished(rows, 13, 16), 0)
    found = target.decode_target(q, k, rows, 16, scale=0.25, sinks=sinks, pool=pool)
    torch.testing.assert_close(found, whole / whole.sum(-1, keepdim=True))


@pytest.mark.parametrize("pool", POOLS)
def test_a_target_of_decoding_is_finite_where_the_own_block_takes_all(pool):
    q, k = qk(40, batch=1)
    k[:, :, 32:] *= 1e4
    found = target.decode_target(q, k, torch.tensor([39]), 16, scale=1.0, pool=pool)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, 1))


@pytest.mark.parametrize("tokens", [64, 100, 2048, 8192, 100_000])
def test_rows_of_decoding_are_spread_over_the_text_and_over_the_places_in_a_block(tokens):
    rows = target.decode_rows(tokens)
    assert len(rows) == min(target.DECODE_ROWS, tokens - tokens // 4)
    assert (rows.diff() > 0).all()
    assert tokens // 4 <= rows[0]
    assert rows[-1] < tokens
    if tokens >= 2048:
        places = torch.bincount(rows % 64, minlength=64)
        assert places.min() >= 0.25 * len(rows) / 64
        assert rows.diff().max() <= 2 * tokens / len(rows)


def test_learned_rows_of_decoding_are_distinct_where_nearly_all_are_taken(monkeypatch):
    monkeypatch.setattr(target, "DECODE_ROWS", 700)
    assert len(set(target.decode_rows(1000).tolist())) == 700


def test_a_long_sequence_teaches_by_a_run_of_its_later_rows():
    # 170 blocks have 128 rows that count.
    for tokens in (1, 640, 170 * 64):
        rows = taught_rows(tokens, 64, 0.9)
        assert (rows.first, rows.num_queries) == (0, tokens)
    tokens, found = 400 * 64 - 5, set()
    for place in np.linspace(0, 1, 500, endpoint=False):
        rows = taught_rows(tokens, 64, place)
        assert rows.first % 64 == 0
        assert rows.num_queries in (PREFILL_ROWS * 64, PREFILL_ROWS * 64 - 5)
        found |= set(range(rows.first // 64, -(-rows.num_keys // 64)))
    assert found == set(range(100, 400))


@pytest.mark.parametrize("tokens", [1000, 1024])
def test_rows_of_a_run_count_as_they_do_among_all(tokens):
    target, scores = target_of(16), torch.randn(1, 2, 16, 16)
    whole, first = counted(target, scores, (64, 64), tokens), 4
    run = Rows.at(6 * 64, min(5 * 64, tokens - 6 * 64))
    part = counted(target[:, :, 6:11, :11], scores[:, :, 6:11, :11], (64, 64), tokens, taught=run)
    for mine, all_rows in zip(part, whole, strict=True):
        assert torch.equal(mine, all_rows[..., 6 - first : 11 - first, :11])
