"""Intervals: as their definitions and published tables have them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from seerattention.measure.intervals import mean_interval, newcombe, rise, t_quantile, wilson


def test_wilson_solves_its_equation() -> None:
    z = 1.959963984540054
    for share, count in ((0.5, 10), (0.9, 50), (0.0, 8), (1.0, 50), (0.37, 200)):
        for bound in wilson(share, count):
            # The bounds are the true shares p whose distance from the found one is z standard errors of p.
            assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / count, abs=1e-12)
    assert wilson(0, 8)[0] == 0
    assert wilson(1, 8)[1] == 1


def test_students_quantile_holds_95_per_cent() -> None:
    for freedom in (1, 2, 3, 9, 24, 49):
        x = np.linspace(0, t_quantile(freedom), 20001)
        constant = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        density = constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        assert 2 * np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-6)
    # One sample says nothing about its spread.
    assert mean_interval([3.0]) == (-math.inf, math.inf)
    values = [1.0, 2.0, 4.0]
    half = t_quantile(2) * np.std(values, ddof=1) / math.sqrt(3)
    assert mean_interval(values) == (pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))


def test_newcombe_as_published() -> None:
    # Newcombe (1998), table II, method 10: 56 of 70 minus 48 of 80, and 10 of 10 minus 0 of 20.
    assert newcombe(56 / 70, 70, 48 / 80, 80) == (
        pytest.approx(0.0524, abs=5e-5),
        pytest.approx(0.3339, abs=5e-5),
    )
    assert newcombe(1, 10, 0, 20) == (pytest.approx(0.6791, abs=5e-5), pytest.approx(1.0, abs=5e-5))


def test_a_rise_is_that_of_windows_in_pairs() -> None:
    dense = [2.0, 3.0, 4.0]
    more, half = rise([loss + 0.1 for loss in dense], dense)
    assert more == pytest.approx(math.expm1(0.1))
    assert half == pytest.approx(0, abs=1e-9)
    # Differences of 0, 0.1 and 0.2: Student's 4.3027 times a standard error of 0.1 / sqrt(3).
    more, half = rise([2.0, 3.1, 4.2], dense)
    assert more == pytest.approx(math.expm1(0.1))
    assert half == pytest.approx(math.exp(0.1) * math.sinh(4.30265 * 0.1 / math.sqrt(3)), rel=1e-5)
