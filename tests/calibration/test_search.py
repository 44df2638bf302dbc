"""Calibration: how blocks are shared among heads, what targets hold, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from seerattention.calibration import search as calibration
from seerattention.calibration.fit import Length, Target, fit, pieces
from seerattention.calibration.gains import Maps
from seerattention.calibration.search import Outcome, calibrate
from seerattention.hosts import transformers as host
from seerattention.measure import bundled
from seerattention.measure.compare import measured
from seerattention.policies import Calibrated, Calibration, TopK

KNOBS = TopK(1.0, sink_blocks=1)
BLOCK = 16


@pytest.fixture(scope="module")
def teacher():
    model, tokenizer = bundled.load_teacher()
    return model, bundled.load_teacher_gates(), bundled.text_tokens(tokenizer)[1]


def synthetic(heads=3, windows=2, blocks=64, seed=0):
    """Maps of heads from sharp to diffuse, whose gates see the truth through some noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, windows * blocks, blocks)
    rows = torch.arange(blocks).repeat(windows)
    acausal = torch.arange(blocks) > rows[:, None]
    sharp = torch.linspace(0.7, 3, heads)[:, None, None]
    truth = sharp * torch.randn(shape, generator=generator)
    share = (truth + 0.3 * torch.randn(shape, generator=generator)).masked_fill(acausal, -math.inf)
    mass = truth.masked_fill(acausal, -math.inf).softmax(-1)
    return Maps([0], (BLOCK, BLOCK), rows, share.log_softmax(-1), mass, mass.pow(2), KNOBS)


def chosen(policy, maps, blocks, law_at=None):
    """Density and recall of a policy on maps, block by block; or of its thresholds for another length."""
    read = held = rows = valid = 0
    rule = policy.at(0).rule(law_at or blocks, BLOCK)
    limits = torch.tensor(rule.per_head, dtype=torch.float64)[:, None].log()
    limits = limits + rule.row_exponent * torch.arange(1, blocks + 1).log()
    for s, row in enumerate(maps.rows.tolist()):
        if row >= blocks:
            continue
        for h in range(maps.mass.shape[0]):
            taken = maps.log_share[h, s, : row + 1] > limits[h, row]
            taken[[0, row]] = True
            read, held = read + int(taken.sum()), held + float(maps.mass[h, s, : row + 1][taken].sum())
            rows, valid = rows + 1, valid + row + 1
    return read / valid, held / rows


@pytest.mark.parametrize("blocks", [32, 64])
def test_density_and_recall_are_met_on_other_maps_of_the_same_kind(blocks):
    maps, others = synthetic(), synthetic(seed=1)
    density = Calibrated(fit(maps, Target(density=0.3)), sink_blocks=1)
    assert chosen(density, others, blocks)[0] == pytest.approx(0.3, rel=0.1)
    recall = Calibrated(fit(maps, Target(recall=0.8)), sink_blocks=1)
    assert chosen(recall, others, blocks)[1] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("target", "which"), [(Target(density=0.3), 0), (Target(recall=0.8), 1)])
def test_the_law_carries_to_twice_the_length_where_fixed_thresholds_do_not(target, which):
    maps, longer = synthetic(), synthetic(windows=1, blocks=128, seed=1)
    policy = Calibrated(fit(maps, target), sink_blocks=1)
    error = abs(chosen(policy, longer, 128)[which] - target.value)
    fixed = abs(chosen(policy, longer, 128, law_at=64)[which] - target.value)
    assert error < 0.03
    assert fixed > 2 * error


def test_late_rows_where_questions_stand_read_more_at_the_same_density():
    maps, others = synthetic(), synthetic(seed=1)
    policy, level = (Calibrated(fit(maps, Target(density=0.3), *e), sink_blocks=1) for e in ((), (0.0,)))
    assert chosen(policy, others, 64)[0] == pytest.approx(chosen(level, others, 64)[0], rel=0.02)
    kept = others.rows >= 64 - 8
    parts = {name: getattr(others, name)[:, kept] for name in ("log_share", "mass", "gain")}
    late = replace(others, rows=others.rows[kept], **parts)
    density, recall = chosen(policy, late, 64)
    less, lost = chosen(level, late, 64)
    assert (less, density) == (pytest.approx(0.18, abs=0.01), pytest.approx(0.22, abs=0.01))
    assert recall > lost + 0.04


def test_no_exchange_between_heads_gains():
    length = Length(synthetic(), 64)
    counts = length.spend(length.fraction, 0.2)
    assert length.fraction(counts) >= 0.2
    assert len(set(counts.tolist())) == 3, "heads as different as these share unequally"
    index = torch.arange(3)
    best = length.gained[index, counts].sum()
    for give in range(3):
        for take in range(3):
            for many in (1, 10, 100):
                moved = counts.clone()
                moved[give] -= many
                moved[take] += many
                if give != take and moved.min() >= 0:
                    assert length.gained[index, moved].sum() <= best + 1e-9


@pytest.mark.parametrize("gain", [lambda mass: mass.pow(2), lambda mass: ((32 * mass).round() - 1) / 32])
@pytest.mark.parametrize("name", ["fraction", "recall"])
def test_each_head_takes_as_many_as_are_worth_the_price_most(gain, name):
    maps = synthetic()
    noise = torch.randn(maps.gain.shape, generator=torch.Generator().manual_seed(2))
    # Some blocks gain nothing, some the same, some less than nothing.
    length = Length(replace(maps, gain=gain(maps.mass * (1 + noise))), 64)
    measure, index = getattr(length, name), torch.arange(length.gained.shape[1]).double()
    for wanted in (0.0, 0.3, 0.6, 0.8, 0.95, 1.0):
        low, high = math.log(1e-16), math.log(1e4)
        best = torch.full((3,), length.gained.shape[1] - 1)
        for _ in range(48):
            price = (low + high) / 2
            taken = (length.gained - math.exp(price) * index).argmax(1)
            if measure(taken) >= wanted:
                low, best = price, taken
            else:
                high = price
        assert length.spend(measure, wanted).equal(best)


@pytest.mark.parametrize(
    ("gained", "expected"),
    [
        ([0, 3, 4, 4.5], [(3, 1), (1, 1), (0.5, 1)]),
        ([0, 1, 3, 3, 2], [(1.5, 2), (0, 1), (-1, 1)]),
        ([0, 1, 2, 3], [(1, 3)]),
        ([0, 2, 3, 3.5, 9], [(2.25, 4)]),
        ([0, -1], [(-1, 1)]),
        ([0], []),
    ],
)
def test_pieces_are_those_of_the_least_concave_curve_above(gained, expected):
    slope, width = pieces(np.array(gained, dtype=float))
    assert list(zip(slope.tolist(), width.tolist(), strict=True)) == expected


def test_limits_and_counts_are_inverse():
    length = Length(synthetic(), 32)
    for fraction in (0.0, 0.1, 0.5, 0.95):
        counts = length.spend(length.fraction, fraction)
        assert length.counts(length.limits(counts)).equal(counts)


def test_targets():
    assert Target(recall=0.9).name == "recall"
    for wrong in ({}, {"density": 0.1, "recall": 0.9}):
        with pytest.raises(ValueError, match="exactly one of density, recall and ppl_increase"):
            Target(**wrong)
    for wrong in ({"density": 0.0}, {"recall": 1.0}, {"ppl_increase": -0.01}, {"density": float("nan")}):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            Target(**wrong)


def test_out_of_reach_says_what_is_reachable():
    maps = synthetic()
    always = (2 * 64 - 1) / (64 * 65 / 2)
    with pytest.raises(
        ValueError, match=rf"out of reach at 1,024 tokens: .* {always:.1%} of all; ask for at"
    ):
        fit(maps, Target(density=0.03))
    with pytest.raises(ValueError, match=r"recall 1.0% needs no thresholds at 1,024 tokens: .* keep \d"):
        fit(maps, Target(recall=0.01))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"length": 2048, "windows": 40},
            r"the text has 51,780 tokens, 40 windows of 2,048 need 81,920; give",
        ),
        ({"length": 65536, "windows": 2}, "past the model's limit of 32768 tokens"),
        ({"length": 1000}, "multiple of the gates' block of 64 tokens"),
        ({"length": 512}, "at least 16 of them, 1024, got 512"),
        ({"windows": 1}, "windows must be at least 2"),
        ({"length": 1024, "target": Target(density=0.2)}, r"out of reach at 1,024 tokens: .* 22.8% of all"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(teacher, monkeypatch, settings, message):
    model, gates, text = teacher
    monkeypatch.setattr(calibration, "record", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        calibrate(model, gates, text, **{"target": Target(density=0.3), **settings})


def test_gates_of_another_model_are_refused_before_the_model_runs(teacher, monkeypatch):
    model, gates, text = teacher
    other = host.Gates(gates.config, bundled.load_teacher_gates().base, [0, 1])
    monkeypatch.setattr(calibration, "record", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="these gates are for layers"):
        calibrate(model, other, text, Target(density=0.3), length=1024, windows=2)
    assert not host.attached(model)


def test_gates_that_are_not_finite_are_refused(teacher):
    model, _, text = teacher
    gates = bundled.load_teacher_gates()
    with torch.no_grad():
        next(iter(dict(gates.items())[3].parameters())).fill_(math.nan)
    with pytest.raises(ValueError, match=r"layers.3.self_attn.*holds NaN or infinity; train the gates"):
        calibrate(model, gates, text, Target(density=0.4), length=1024, windows=2)


def sparse(monkeypatch, rise):
    """Let sparse perplexity be the dense one, risen by what a function says of the policy."""

    dense = []

    def stand_in(model, scorer, policy=None, **given):
        if scorer is None:
            dense.append(measured(model, None, **given))
            return dense[-1]
        return replace(dense[-1], perplexity=dense[-1].perplexity * rise(policy), recall=1.0)

    monkeypatch.setattr(calibration, "measured", stand_in)


def test_a_perplexity_out_of_reach_says_the_best(teacher, monkeypatch):
    model, gates, text = teacher
    rises = iter([1.5])
    sparse(monkeypatch, lambda policy: next(rises))
    with pytest.raises(
        ValueError, match=r"increase of 1.0% is out of reach: at a density of 90% it is 50.0%"
    ):
        calibrate(model, gates, text, Target(ppl_increase=0.01), length=1024, windows=2)


def test_the_least_density_within_a_perplexity_is_found(teacher, monkeypatch):
    model, gates, text = teacher
    sparse(monkeypatch, lambda policy: 1 + 0.01 * 0.5 / policy.calibration.density)
    found = calibrate(model, gates, text, Target(ppl_increase=0.01), length=1024, windows=2)
    assert found.policy.calibration.density == pytest.approx(0.5, rel=0.03)
    assert found.policy.calibration.density >= 0.5
    assert (found.policy.calibration.target, found.policy.calibration.value) == ("ppl_increase", 0.01)


def test_windows_to_fit_to_are_changed_and_those_to_measure_on_are_not(teacher, monkeypatch):
    model, gates, text = teacher
    fitted, measured_on, record = [], [], calibration.record

    def measures(*given, windows, **more):
        measured_on.extend(windows)
        return measured(*given, windows=windows, **more)

    def records(model, gates, windows, *more):
        fitted.extend(windows)
        return record(model, gates, windows, *more)

    monkeypatch.setattr(calibration, "record", records)
    monkeypatch.setattr(calibration, "measured", measures)
    settings = {"length": 1024, "windows": 2}
    calibrate(model, gates, text, Target(density=0.4), mix=lambda w: [x[::-1].copy() for x in w], **settings)
    assert np.array_equal(fitted, [text[1023::-1]])
    assert {window.tobytes() for window in measured_on} == {text[1024:n].tobytes() for n in (1536, 2048)}


@pytest.mark.parametrize(
    ("target", "found", "said"),
    [
        # SmolLM2-135M: asked for 20 %, it read 34.2 %, and the advice was to read more.
        (
            Target(density=0.2),
            {"density": 0.342},
            "20.0% was asked for and missed at 2,048 tokens, where it is 34.2%; thresholds depend on the "
            "text: calibrate on more windows, of text and length like your prompts, or use top_k:0.2, which "
            "reads as much of any text",
        ),
        (Target(density=0.2), {"density": 0.15}, "missed at 2,048 tokens, where it is 15.0%"),
        (Target(density=0.2), {"density": 0.219}, "perplexity +5.0%: a higher density is worth its time"),
        (
            Target(recall=0.9),
            {"recall": 0.88},
            "90.0% was asked for and missed at 2,048 tokens, where it is 88",
        ),
        (Target(recall=0.9), {"recall": 0.95, "perplexity": 10.0}, "perplexity +0.0%: use it as it is"),
        (Target(ppl_increase=0.01), {}, "1.0% was asked for and missed at 2,048 tokens, where it is 5.0%"),
        (Target(ppl_increase=0.1), {}, "perplexity +5.0%: a higher density"),
    ],
)
def test_what_missed_its_target_says_so_and_what_helps(target, found, said):
    laws = {0: ((-1.0, 0.0, 0.0),)}
    made = Calibration(target.name, target.value, 2048, (64, 64), 0.0, target.density, laws)
    met = {"density": 0.2, "recall": 0.9, "perplexity": 10.5, "dense_perplexity": 10.0} | found
    rows = [met | {"tokens": 1024}, met | {"tokens": 2048}]
    assert said in Outcome(Calibrated(made), rows, [], []).recommendation()


def test_a_target_missed_at_half_the_length_alone_is_missed():
    made = Calibration("density", 0.2, 2048, (64, 64), 0.0, 0.2, {0: ((-1.0, 0.0, 0.0),)})
    row = {"tokens": 2048, "density": 0.2, "recall": 0.9, "perplexity": 10.0, "dense_perplexity": 10.0}
    outcome = Outcome(Calibrated(made), [row | {"tokens": 1024, "density": 0.3}, row], [], [])
    assert "missed at 1,024 tokens, where it is 30.0%" in str(outcome.missed())


@pytest.mark.parametrize(
    ("asked", "found", "said", "unsaid"),
    [
        (
            0.15,
            0.229,
            "perplexity +0.0%: use it as it is; at 1,024 tokens it reads 22.9%, which is the floor and no "
            "miss: the blocks that are always read are 22.8% of all there, more than the 15.0% asked for",
            "depend on the text",
        ),
        # More than the floor is read by choice.
        (0.15, 0.3, "15.0% was asked for and missed at 1,024 tokens, where it is 30.0%", "floor"),
        (0.25, 0.24, "perplexity +0.0%: use it as it is", "floor"),
    ],
)
def test_a_length_too_short_for_a_density_is_at_its_floor_and_missed_nothing(asked, found, said, unsaid):
    """1,024 tokens are 16 blocks of 64: rows always read their own and the first, 31 of 136 in all."""
    made = Calibration("density", asked, 2048, (64, 64), 0.0, asked, {0: ((-1.0, 0.0, 0.0),)})
    row = {"tokens": 2048, "density": asked, "recall": 0.9, "perplexity": 10.0, "dense_perplexity": 10.0}
    half = row | {"tokens": 1024, "density": found}
    told = Outcome(Calibrated(made, sink_blocks=1), [half, row], [], []).recommendation()
    assert said in told
    assert unsaid not in told


def test_measured_on_text_that_was_not_fitted_to(teacher):
    model, gates, text = teacher
    found = calibrate(model, gates, text, Target(recall=0.9), length=2048, windows=2)
    half, whole = found.rows
    assert (half["tokens"], whole["tokens"]) == (1024, 2048)
    for row in found.rows:
        assert row["recall"] == pytest.approx(0.9, abs=0.02)
        assert row["density"] < 0.8
    assert half["density"] > whole["density"], "a longer text needs a smaller part"
    again = measured(
        model, gates, found.policy, windows=[text[2048:4096]], recall_rows=calibration.RECALL_ROWS
    )
    assert (again.density, again.recall, again.perplexity) == (
        whole["density"], whole["recall"], whole["perplexity"],
    )  # fmt: skip
    assert f"reads {whole['density']:.1%} of the blocks at 2,048 tokens" in found.recommendation()
    heads = np.array(found.head_densities)
    assert heads.shape == (8, 6)
    assert heads.max() - heads.min() > 0.2
    recalls = [point["recall"] for point in found.curve]
    assert recalls == sorted(recalls)
    assert not host.attached(model)
