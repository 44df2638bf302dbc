"""What every objective must do, and what each says it is, computed slowly."""

import pytest
import torch

from seerattention.train import objectives
from seerattention.train.target import counted

SIZE = (16, 16)


def inputs(blocks, seed=0):
    torch.manual_seed(seed)
    target = torch.rand(2, 3, blocks, blocks).square().tril()
    target[..., 0] += 0.05
    scores = torch.randn(2, 3, blocks, blocks, requires_grad=True)
    return target / target.sum(-1, keepdim=True), scores


def value(name, target, scores):
    blocks = scores.shape[-1]
    return objectives.create(name)(*counted(target, scores, SIZE, blocks * SIZE[0]))


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


def test_a_divergence_is_zero_at_the_target():
    target, _ = inputs(12)
    scores = (target + 1e-30).log().requires_grad_()
    loss = value("kl", target, scores)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert scores.grad.abs().max() < 1e-6


def test_an_unknown_objective_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown objective 'klx'; there are kl, sharp_kl"):
        objectives.create("klx")


def test_sharp_kl_learns_the_squared_target():
    target, scores = inputs(12)
    squared = target.square()
    expected = value("kl", squared / squared.sum(-1, keepdim=True), scores)
    torch.testing.assert_close(value("sharp_kl", target, scores), expected)
