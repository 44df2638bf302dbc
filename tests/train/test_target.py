import math

import pytest
import torch

from seerattention.train import target_recall
from seerattention.train.objectives.kl import KL


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
    loss = KL()(target.double(), scores.double(), (64, 64), tokens)
    assert float(loss) == pytest.approx(slow_loss(target.double(), scores.double()), rel=1e-12)


def test_loss_is_zero_for_the_target_itself_and_has_finite_gradients():
    target = target_of(8, zeros=True)
    scores = target.log().clamp(min=-1e4).requires_grad_()
    loss = KL()(target, scores, (64, 64), 512)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=8 * torch.finfo(torch.float32).eps)
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())


def test_acausal_scores_and_early_rows_do_not_count():
    target, scores = target_of(8), torch.randn(1, 2, 8, 8)
    before = KL()(target, scores, (64, 64), 512)
    changed = scores.clone()
    changed[:, :, ~torch.ones(8, 8, dtype=torch.bool).tril()] = 1e3
    changed[:, :, :2] = torch.randn(1, 2, 2, 8)
    assert torch.equal(KL()(target, changed, (64, 64), 512), before)


def test_different_shapes_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"per_kv_head=True"):
        KL()(target_of(4, heads=4), torch.randn(1, 2, 4, 4), (64, 64), 256)


def test_recall_is_the_mass_of_the_best_blocks():
    target = target_of(8)
    # k = floor((1 - sqrt(1 - 0.5)) * 8) = 2
    best = [float(target[0, h, i].topk(2).values.sum()) for h in range(2) for i in range(2, 8)]
    recall = target_recall(target, target.log(), (64, 64), 512, 0.5)
    assert recall == pytest.approx(sum(best) / len(best), rel=1e-6)
    assert target_recall(target, -target.log().clamp(min=-100), (64, 64), 512, 0.5) < recall
    assert target_recall(target, torch.zeros(1, 2, 8, 8), (64, 64), 512, 1.0) == pytest.approx(1)
