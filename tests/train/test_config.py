"""Settings of training: schedules, and what is refused."""

import itertools
import math
from dataclasses import fields

import pytest

from seerattention.train import DistillConfig, FinetuneConfig


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = DistillConfig(steps=100, warmup=0.1)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001


@pytest.mark.parametrize("kind", [DistillConfig, FinetuneConfig])
def test_an_unknown_target_names_the_known_ones(kind):
    with pytest.raises(ValueError, match=r"^target must be one of max, mass, both, got 'sum'$"):
        kind(target="sum")


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0.0}, {"warmup": 1.0}, {"save_every": 0}, {"recall_density": 0.0}]
)
def test_distill_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillConfig(**wrong)


def test_densities_fall_from_dense_and_are_drawn_from_their_range():
    config = FinetuneConfig(steps=1000, density=(0.1, 0.5), dense_share=0.2)
    densities = [config.density_at(step) for step in range(1000)]
    assert densities[0] == 1
    assert densities[100] > 0.5
    rest = densities[200:]
    assert 0.1 <= min(rest) < 0.11
    assert 0.48 < max(rest) <= 0.5
    middle = sum(d < (0.1 * 0.5) ** 0.5 for d in rest)
    assert 330 < middle < 470
    assert FinetuneConfig(density=(0.2, 0.2)).density_at(7) == 0.2


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"lr": 0.0}, {"gate_weight": -1.0}, {"density": (0.5, 0.1)}, {"density": (0.0, 0.1)},
        {"dense_share": 1.5}, {"temperature": 0.0}, {"warmup": 1.0}, {"warmup_gate_steps": -1},
    ],
)  # fmt: skip
def test_joint_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FinetuneConfig(**wrong)


def test_one_density_is_a_range_of_one():
    assert FinetuneConfig(density=0.3).densities == FinetuneConfig(density=(0.3, 0.3)).densities == (0.3, 0.3)


@pytest.mark.parametrize("kind", [DistillConfig, FinetuneConfig])
def test_numbers_that_are_not_finite_or_past_all_counting_are_refused_at_once(kind):
    # Without a default of its own the rate is the phase's.
    found = {f.name: f.default for f in fields(kind)} | {"lr": 1e-3}
    numbers = [(name, default) for name, default in found.items() if type(default) in (int, float)]
    assert {"lr", "steps", "warmup"} < {name for name, _ in numbers}
    for name, default in numbers:
        wrong = (2**63, -1) if isinstance(default, int) else (math.inf, -math.inf, math.nan, 1e38)
        for value in wrong:
            with pytest.raises(ValueError, match=f"{name} must be"):
                kind(**{name: value})
