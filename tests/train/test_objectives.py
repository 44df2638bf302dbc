"""What every objective must do, and what each says it is, computed slowly."""

import pytest
import torch
import torch.nn.functional as F

from seerattention.train import objectives

SIZE = (16, 16)
#: KL in all its forms is least where the gate's distribution is the target's.
DIVERGENCES = {"kl", "far_kl", "focused_kl"}


def inputs(blocks, seed=0):
    torch.manual_seed(seed)
    target = torch.rand(2, 3, blocks, blocks).square().tril()
    target[..., 0] += 0.05
    scores = torch.randn(2, 3, blocks, blocks, requires_grad=True)
    return target / target.sum(-1, keepdim=True), scores


def value(name, target, scores):
    blocks = scores.shape[-1]
    return objectives.create(name)(target, scores, SIZE, blocks * SIZE[0])


@pytest.mark.parametrize("blocks", [1, 2, 5, 40])
@pytest.mark.parametrize("name", objectives.names())
def test_acausal_scores_count_nothing_and_get_no_gradient(name, blocks):
    target, scores = inputs(blocks)
    loss = value(name, target, scores)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()
    later = torch.ones(blocks, blocks, dtype=torch.bool).triu(1)
    assert (scores.grad[..., later] == 0).all()
    changed = torch.where(later, torch.full_like(scores, 1e4), scores.detach())
    assert torch.equal(value(name, target, changed), loss.detach())


@pytest.mark.parametrize("name", objectives.names())
def test_descending_makes_the_choice_better(name):
    target, scores = inputs(40)
    free = torch.ones(40, 40, dtype=torch.bool).tril(-1)
    free[:, 0] = False

    def caught():
        chosen = scores.detach().masked_fill(~free, float("-inf")).topk(4, -1).indices
        return (target * free).gather(-1, chosen)[:, :, 10:].sum(-1).mean()

    before = caught()
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        value(name, target, scores).backward()
        optimizer.step()
    assert caught() > 1.2 * before


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_divergence_is_zero_at_the_target(name):
    target, _ = inputs(12)
    scores = (target + 1e-30).log().requires_grad_()
    loss = value(name, target, scores)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert scores.grad.abs().max() < 1e-6


def slow_cut(row, free, count):
    best = sorted((float(row[i]) for i in free), reverse=True)
    return None if len(best) <= count else (best[count - 1] + best[count]) / 2


def slow_decisions(target, scores, density):
    """Yield per decided row the free blocks, and how far scores and target lie above their cuts."""
    blocks = scores.shape[-1]
    count = max(1, int((1 - (1 - density) ** 0.5) * blocks))
    for row in range(int(0.25 * blocks), blocks):
        free = range(1, row)
        for t, s in zip(target[:, :, row].flatten(0, 1), scores[:, :, row].flatten(0, 1), strict=True):
            if (bar := slow_cut(s, free, count)) is not None:
                best = slow_cut(t, free, count)
                yield [(float(s[i]) - bar, float(t[i]) - best) for i in free]


def softplus(x):
    return float(F.softplus(torch.tensor(x, dtype=torch.float64)))


def test_regret_weighs_wrong_sides_by_their_cost():
    target, scores = inputs(40)
    means = []
    for density in (0.05, 0.1, 0.2):
        rows = [
            sum(abs(worth) * softplus(-above if worth > 0 else above) for above, worth in row)
            for row in slow_decisions(target, scores.detach(), density)
        ]
        means.append(sum(rows) / len(rows))
    assert float(value("regret", target, scores).detach()) == pytest.approx(sum(means) / 3, rel=1e-5)


def test_membership_is_a_balanced_cross_entropy():
    target, scores = inputs(40)
    means = []
    for density in (0.05, 0.1, 0.2):
        rows = []
        for row in slow_decisions(target, scores.detach(), density):
            inside = [softplus(-above) for above, worth in row if worth > 0]
            outside = [softplus(above) for above, worth in row if worth <= 0]
            rows.append((sum(inside) / max(1, len(inside)) + sum(outside) / max(1, len(outside))) / 2)
        means.append(sum(rows) / len(rows))
    assert float(value("membership", target, scores).detach()) == pytest.approx(sum(means) / 3, rel=1e-5)


def test_mixture_is_the_sum_of_its_parts():
    target, scores = inputs(40)
    parts = value("kl", target, scores) + 3 * value("regret", target, scores)
    assert torch.equal(value("mixture", target, scores), parts)


def test_an_unknown_objective_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown objective 'klx'; there are far_kl, focused_kl, kl"):
        objectives.create("klx")


def test_sharp_kl_learns_the_squared_target():
    target, scores = inputs(12)
    squared = target.square()
    expected = value("kl", squared / squared.sum(-1, keepdim=True), scores)
    torch.testing.assert_close(value("sharp_kl", target, scores), expected)
