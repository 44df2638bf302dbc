"""95 % intervals of shares and of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

#: Two-sided confidence.
CONFIDENCE = 0.95


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the interval of a share over independent samples.

    Samples with several answers count as one each, with the share of them that was right: their variance is
    at most that of a yes or no of the same mean, so the interval is then too wide rather than too narrow.

    Args:
        share: Mean of the samples' scores, 0 to 1.
        count: Samples, at least one.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    weight = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / weight
    half = z / weight * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def newcombe(share: float, count: int, other: float, other_count: int) -> tuple[float, float]:
    """Return the interval of ``share - other``, over so many independent samples each.

    Samples that both share make the difference more certain than this says, never less.

    Source: Newcombe (1998), Interval estimation for the difference between independent proportions,
    method 10.
    """
    (low, high), (other_low, other_high) = wilson(share, count), wilson(other, other_count)
    return (
        share - other - math.hypot(share - low, other_high - other),
        share - other + math.hypot(high - share, other - other_low),
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's interval of the mean of independent values; infinitely wide for a single one."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def rise(losses: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """Return by what share a perplexity is above dense attention's, and half of its interval.

    Args:
        losses: Mean loss of every window, in nats.
        dense: Those of dense attention on the same windows.
    """
    differences = [loss - other for loss, other in zip(losses, dense, strict=True)]
    low, high = mean_interval(differences)
    return math.expm1(fmean(differences)), (math.exp(high) - math.exp(low)) / 2


def t_quantile(freedom: int) -> float:
    """Return the t within which a share `CONFIDENCE` of Student's distribution lies, either side of zero.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _mass(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
