"""What every objective must do, and what each says it is, computed slowly."""

import pytest
import torch

from seerattention.train import objectives
from seerattention.train.target import counted, decode_counted

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
    with pytest.raises(ValueError, match="unknown objective 'klx'; there are choice_kl, kl, sharp_kl"):
        objectives.create("klx")


def test_sharp_kl_learns_the_squared_target():
    target, scores = inputs(12)
    squared = target.square()
    expected = value("kl", squared / squared.sum(-1, keepdim=True), scores)
    torch.testing.assert_close(value("sharp_kl", target, scores), expected)


@pytest.mark.parametrize("among_all", [0.0, 0.1])
def test_choice_kl_leaves_out_what_is_read_anyway(among_all):
    target, scores = inputs(12)
    choice = torch.ones(12, 12, dtype=torch.bool).tril(-1)
    choice[:, 0] = False
    expected = among_all * value("kl", target, scores)
    for b in range(2):
        for h in range(3):
            # Of 12 rows the first three are not counted; the fourth chooses among two blocks.
            for row in range(3, 12):
                rest = target[b, h, row][choice[row]]
                said = scores[b, h, row][choice[row]].log_softmax(0)
                rest = rest / rest.sum()
                expected = expected + (rest * (rest.log() - said)).sum() / (2 * 3 * 9)
    found = objectives.create("choice_kl", among_all=among_all)
    torch.testing.assert_close(found(*counted(target, scores, SIZE, 12 * SIZE[0])), expected)


def test_choice_kl_of_rows_without_a_choice_is_nothing():
    target, scores = inputs(2)
    found = objectives.create("choice_kl", among_all=0.0)(*counted(target, scores, SIZE, 2 * SIZE[0]))
    found.backward()
    assert float(found.detach()) == 0
    assert not scores.grad.any()


def test_what_decoding_reads_anyway_is_the_first_and_the_own_finished_block():
    rows = torch.tensor([16, 31, 40])
    found = decode_counted(torch.rand(1, 1, 3, 3), torch.rand(1, 1, 3, 3), rows, 16)
    assert found.valid.tolist() == [[True, False, False], [True, True, False], [True, True, False]]
    # The block that position 31 finishes is its own; that of position 40 is the third, unfinished.
    assert found.always.tolist() == [[True, False, False], [True, True, False], [True, False, False]]
