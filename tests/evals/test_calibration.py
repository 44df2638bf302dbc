"""Calibration: what is recorded, how blocks are shared among heads, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from seerattention import models
from seerattention.baselines.oracle_mass import OracleMass
from seerattention.evals import bundled, calibration
from seerattention.evals.calibration import Maps, Target, calibrate, fit, measure, record
from seerattention.models import intercept
from seerattention.policies import Calibrated, TopK

KNOBS = TopK(1.0, sink_blocks=1)
BLOCK = 16


@pytest.fixture(scope="module")
def teacher():
    model, tokenizer = bundled.load_teacher()
    return model, bundled.load_teacher_gates(), bundled.text_tokens(tokenizer)[1]


def calls_of(model, tokens):
    """The inputs of every attention layer."""
    calls = {}

    def handler(call):
        calls[call.layer] = call
        return call.dense()

    with intercept(model, handler), torch.no_grad():
        model(torch.from_numpy(tokens)[None], use_cache=False)
    return calls


def test_recorded_rows_are_the_gates_and_the_true_ones(teacher):
    model, gates, text = teacher
    tokens = text[:1000]
    gates.use_rotary_of(model)
    maps = record(model, gates, [tokens], KNOBS)
    assert maps.rows.tolist() == list(range(16))
    calls = calls_of(model, tokens)
    heads = gates.config.num_heads
    positions = torch.arange(1000)
    for at, (layer, gate) in enumerate(gates.items()):
        part, call = slice(at * heads, (at + 1) * heads), calls[layer]
        with torch.no_grad():
            scores = gate(call.q_nope, call.k_nope, positions=positions)[0]
        acausal = torch.ones(16, 16, dtype=torch.bool).triu(1)
        share = scores.masked_fill(acausal, -math.inf).softmax(-1)
        torch.testing.assert_close(maps.log_share[part].exp(), share)
        # The short last block's mean is over its own tokens.
        sums = OracleMass().score(call.q, call.k, positions=positions, valid=~acausal)[0].exp()
        per_query = sums / torch.tensor([64.0] * 15 + [40.0])[:, None]
        torch.testing.assert_close(maps.mass[part], per_query, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sinks", [False, True])
def test_gain_is_how_much_nearer_the_output_comes(teacher, sinks, monkeypatch):
    model, gates, text = teacher
    tokens = text[:640]
    gates.use_rotary_of(model)
    if sinks:
        # As a model whose heads have a learnt sink each would call it.
        monkeypatch.setattr(calibration, "intercept", with_sinks)
    maps = record(model, gates, [tokens], replace(KNOBS, local_blocks=2, dense_last_rows=1))
    call = calls_of(model, tokens)[2]
    q, k, v = call.q[0].double(), call.k[0].double(), call.v[0].double()
    k, v = k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)
    scores = (q @ k.mT * call.scale).masked_fill(torch.ones(640, 640).triu(1).bool(), -math.inf).exp()

    def output(rows, read):
        """What is read, alone: the definition, one block after the other."""
        columns = torch.cat([torch.arange(64 * j, 64 * (j + 1)) for j in read])
        part = scores[:, rows][..., columns]
        total = part.sum(-1, keepdim=True) + (SINKS.double().exp()[:, None, None] if sinks else 0)
        return part @ v[:, columns] / total

    norm = output(slice(0, 640), range(10)).pow(2).sum(-1).mean(1).sum()
    for h, row in ((12, 9), (14, 6), (17, 3)):
        rows, head = slice(64 * row, 64 * (row + 1)), h - 12
        read = [0, row - 1, row]
        assert maps.gain[h, row, read].eq(0).all()
        free = [j for j in maps.log_share[h, row].argsort(descending=True).tolist() if 0 < j < row - 1]
        whole = output(rows, range(row + 1))
        error = (output(rows, read) - whole)[head].pow(2).sum(-1).mean()
        for j in free:
            read.append(j)
            less = (output(rows, read) - whole)[head].pow(2).sum(-1).mean()
            assert float(maps.gain[h, row, j]) == pytest.approx(
                float((error - less) / norm), rel=1e-3, abs=1e-8
            )
            error = less
        assert float(error / norm) < 1e-12


SINKS = torch.linspace(-1, 2, 6)


def with_sinks(model, handler):
    return intercept(
        model, lambda call: handler(replace(call, sinks=SINKS)) if call.layer == 2 else handler(call)
    )


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
    limits = policy.at(0, law_at).log_limits(blocks, torch.arange(1, blocks + 1))
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


def test_no_exchange_between_heads_gains():
    length = calibration._Length(synthetic(), 64)
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


def test_limits_and_counts_are_inverse():
    length = calibration._Length(synthetic(), 32)
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
    other = models.Gates(gates.config, bundled.load_teacher_gates().base, [0, 1])
    monkeypatch.setattr(calibration, "record", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="these gates are for layers"):
        calibrate(model, other, text, Target(density=0.3), length=1024, windows=2)
    assert not models.attached(model)


def test_gates_that_are_not_finite_are_refused(teacher):
    model, _, text = teacher
    gates = bundled.load_teacher_gates()
    with torch.no_grad():
        next(iter(dict(gates.items())[3].parameters())).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="attention of layer 3 are NaN or infinite; check the gates"):
        calibrate(model, gates, text, Target(density=0.4), length=1024, windows=2)


def test_a_perplexity_out_of_reach_says_the_best(teacher, monkeypatch):
    model, gates, text = teacher
    rises = iter([1.5])
    dense = calibration.perplexity(model, text[1024:2048], window=1024, windows=1)

    def measured(*_):
        return {"density": 0.9, "recall": 1.0, "perplexity": dense * next(rises)}

    monkeypatch.setattr(calibration, "measure", measured)
    with pytest.raises(
        ValueError, match=r"increase of 1.0% is out of reach: at a density of 90% it is 50.0%"
    ):
        calibrate(model, gates, text, Target(ppl_increase=0.01), length=1024, windows=2)


def test_the_least_density_within_a_perplexity_is_found(teacher, monkeypatch):
    model, gates, text = teacher
    dense = calibration.perplexity(model, text[1024:2048], window=1024, windows=1)

    def measured(_model, _gates, policy, _windows):
        rise = 0.01 * 0.5 / policy.calibration.density
        return {"density": policy.calibration.density, "recall": 1.0, "perplexity": dense * (1 + rise)}

    monkeypatch.setattr(calibration, "measure", measured)
    found = calibrate(model, gates, text, Target(ppl_increase=0.01), length=1024, windows=2)
    assert found.policy.calibration.density == pytest.approx(0.5, rel=0.03)
    assert found.policy.calibration.density >= 0.5
    assert (found.policy.calibration.target, found.policy.calibration.value) == ("ppl_increase", 0.01)


def test_measured_on_text_that_was_not_fitted_to(teacher):
    model, gates, text = teacher
    found = calibrate(model, gates, text, Target(recall=0.9), length=2048, windows=2)
    half, whole = found.rows
    assert (half["tokens"], whole["tokens"]) == (1024, 2048)
    for row in found.rows:
        assert row["recall"] == pytest.approx(0.9, abs=0.02)
        assert row["density"] < 0.8
    assert half["density"] > whole["density"], "a longer text needs a smaller part"
    again = measure(model, gates, found.policy, [text[2048:4096]])
    assert again == {name: whole[name] for name in again}
    assert f"reads {whole['density']:.1%} of the blocks at 2,048 tokens" in found.recommendation()
    heads = np.array(found.head_densities)
    assert heads.shape == (8, 6)
    assert heads.max() - heads.min() > 0.2
    recalls = [point["recall"] for point in found.curve]
    assert recalls == sorted(recalls)
    assert not models.attached(model)
