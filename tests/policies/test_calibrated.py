"""The policy `calibrated`: its law by hand, its file form, its text form."""

import json
import math

import pytest
import torch

from seerattention.policies import Calibrated, Calibration, parse, select
from seerattention.rows import Rows
from seerattention.selection import causal_blocks

LAWS = {0: ((-2.0, -0.5, 0.25), (-3.0, 0.0, 0.0)), 3: ((0.5, -1.0, 0.0), (-1.0, 0.5, -0.5))}


def calibration(**changes):
    settings = {
        "target": "density",
        "value": 0.3,
        "tokens": 1024,
        "block_size": (16, 16),
        "row_exponent": -0.5,
        "density": 0.3,
        "laws": LAWS,
    }
    return Calibration(**{**settings, **changes})


def limit_by_hand(law, n, row_sees, *, density, always):
    a, b, s = law
    free = 0.0 if density is None else math.log((density - always) / (1 - always))
    return a + b * math.log(n) + s * free - 0.5 * math.log(row_sees)


@pytest.mark.parametrize("density", [0.3, None])
@pytest.mark.parametrize("layer", [0, 3])
def test_the_law_is_the_one_written_down(density, layer):
    blocks = 20
    policy = Calibrated(calibration(density=density), sink_blocks=1).at(layer)
    rule = policy.rule(blocks, 16)
    assert rule.kind == "share"
    # The own block of every row, and the first one.
    always = (2 * blocks - 1) / (blocks * (blocks + 1) / 2)
    for h, law in enumerate(LAWS[layer]):
        for row in (0, 7, 19):
            expected = limit_by_hand(law, blocks, row + 1, density=density, always=always)
            found = math.log(rule.per_head[h]) + rule.row_exponent * math.log(row + 1)
            assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("layer", [0, 3])
def test_selection_is_that_of_a_slow_formula(layer):
    blocks, size = 12, (16, 16)
    scores = 2 * torch.randn(2, 2, blocks, blocks)
    policy = Calibrated(calibration(density=None), sink_blocks=1).at(layer)
    tokens = blocks * 16
    found = select(policy, scores, rows=Rows.last(tokens, tokens), block_size=size).to_mask()
    for b in range(2):
        for h in range(2):
            for i in range(blocks):
                limit = limit_by_hand(LAWS[layer][h], blocks, i + 1, density=None, always=None)
                shares = torch.softmax(scores[b, h, i, : i + 1], 0)
                expected = [j in (0, i) or float(share) > math.exp(limit) for j, share in enumerate(shares)]
                assert found[b, h, i].tolist() == expected + [False] * (blocks - 1 - i)


def test_a_piece_chooses_as_the_whole_prompt_does():
    blocks, size = 16, (16, 16)
    scores = 2 * torch.randn(1, 2, blocks, blocks)
    policy = Calibrated(calibration(), sink_blocks=1)
    whole = policy.at(3).choose(scores, causal_blocks(256, 256, size), 16)
    piece = scores[:, :, 4:8, :8]
    valid = causal_blocks(64, 128, size)
    untold = policy.at(3)
    told = untold.for_prompt(blocks, 16, rows_after=2)
    told, untold = (x.choose(piece, valid, 16) for x in (told, untold))
    assert (told & valid).equal(whole[:, :, 4:8, :8] & valid)
    assert not untold.equal(told), "the length makes no difference here, so the test shows nothing"


def test_density_below_what_is_always_read_takes_nothing_else():
    policy = Calibrated(calibration(density=0.01, laws={0: ((-1.0, 0.0, -1.0),)}), sink_blocks=1).at(0)
    valid = causal_blocks(64, 64, (16, 16))
    assert not policy.choose(torch.randn(1, 1, 4, 4), valid, 16).any()
    assert policy.expected_density(4, 16) == pytest.approx(7 / 10)


def test_expected_density():
    policy = Calibrated(calibration())
    assert policy.expected_density(256, 16) == 0.3
    assert policy.expected_density(4, 16) == pytest.approx(0.4), "the own block of 4 rows"
    assert Calibrated(calibration(density=None)).expected_density(256, 16) is None


def test_its_rule_takes_what_it_chooses():
    policy = Calibrated(calibration(density=0.3), sink_blocks=1).at(0)
    scores = torch.randn(2, len(policy.calibration.laws[0]), 40, 40, dtype=torch.float64) * 2
    valid = causal_blocks(40 * 16, 40 * 16, (16, 16))
    rule = policy.rule(40, 16)
    share = scores.masked_fill(~valid, -torch.inf).softmax(-1)
    limits = torch.tensor(rule.per_head)[:, None] * valid.sum(-1).double() ** rule.row_exponent
    expected = share > limits[..., None]
    assert 0.05 < expected.double().mean() < 0.4
    assert (expected == policy.choose(scores, valid, 16)).double().mean() > 0.999


def test_text_form():
    made = calibration()
    policy = Calibrated(made, sink_blocks=1, dense_last_rows=2)
    assert str(policy) == "calibrated,sink_blocks=1,dense_last_rows=2"
    assert parse(str(policy), made) == policy
    assert parse("calibrated", made) == Calibrated(made)
    with pytest.raises(ValueError, match=r"needs gates that were calibrated.*seerattention calibrate"):
        parse("calibrated,sink_blocks=1")
    with pytest.raises(ValueError, match=r"unknown policy 'calibrated:0.1'; write one of calibrated, thres"):
        parse("calibrated:0.1", made)


def test_json_form_and_back_exactly():
    laws = {0: tuple((float(x), 1 / 3, -1e-17) for x in torch.randn(3, dtype=torch.float64))}
    for made in (calibration(), calibration(density=None, laws=laws, target="recall", value=0.95)):
        assert Calibration.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "its keys must be"),
        ({"target": "speed"}, "target must be one of density, recall, ppl_increase, got 'speed'"),
        ({"density": 1.5}, r"density must be in \(0, 1\]"),
        ({"laws": {}}, "finite law for every head"),
        ({"laws": {"0": [[1.0, 2.0]]}}, "not enough values"),
        ({"laws": {"0": [[1.0, float("nan"), 0.0]]}}, "finite law for every head"),
        ({"laws": [1]}, "another form"),
        ({"tokens": None}, "another form"),
    ],
)
def test_what_is_not_a_calibration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Calibration.from_dict({**calibration().to_dict(), **change})
    missing = calibration().to_dict()
    del missing["laws"]
    with pytest.raises(ValueError, match="its keys must be"):
        Calibration.from_dict(missing)


def test_a_layer_and_its_heads_must_be_calibrated():
    policy = Calibrated(calibration())
    valid = causal_blocks(32, 32, (16, 16))
    with pytest.raises(ValueError, match=r"layer 1 has no calibrated thresholds, layers \[0, 3\] have"):
        policy.at(1)
    with pytest.raises(ValueError, match="belong to a layer"):
        policy.choose(torch.randn(1, 2, 2, 2), valid, 16)
    with pytest.raises(ValueError, match="limits for 2 heads, the scores have 3; calibrate"):
        policy.at(0).choose(torch.randn(1, 3, 2, 2), valid, 16)
