"""Thresholds per layer and head that meet a target at any length, from what blocks gain.

Which blocks a density is best spent on is one Lagrangian: with a price per block, every head takes blocks
from its gate's best down to where their gain no longer pays, so that the marginal gain per block is the same
for all heads. Rows of a causal map do not see what comes later, so that one window holds the maps of all
shorter texts, and the law in the length is fitted to several of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seerattention.calibration.gains import Maps
from seerattention.policies import Calibration
from seerattention.policies.calibrated import log_free
from seerattention.rows import Rows

#: Lengths that the law is fitted to, as shares of a window.
LENGTHS = (0.5, 0.625, 0.75, 0.875, 1.0)

#: Fractions of free blocks that the law is fitted to: from and to, relative to those asked for, and how many.
AROUND = (0.7, 1.4)
FRACTIONS = 5

#: Of the number of blocks that a row sees, in the thresholds; measured in docs/method.md. At 0 late rows, in
#: which questions about a text stand, read least of what they see: the more blocks share a softmax, the fewer
#: reach a share that is the same for all rows.
ROW_EXPONENT = -0.5

#: Gain of a block that is none.
NOTHING = 1e-16

#: How near a density may be to that of the blocks always read; closer, limits depend on a few blocks.
NEAREST = 1.25


@dataclass(frozen=True)
class Target:
    """What to calibrate for, exactly one of these.

    Attributes:
        density: Fraction of the causally valid blocks to read, in (0, 1).
        recall: Share of the attention mass to keep, in (0, 1).
        ppl_increase: The most that perplexity may rise, relative: 0.01 is 1 %.
    """

    density: float | None = None
    recall: float | None = None
    ppl_increase: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of density, recall and ppl_increase, got {', '.join(given) or 'none'}"
            )
        for name, value in given.items():
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")

    @property
    def name(self) -> str:
        """Which of them it is."""
        return next(name for name, value in vars(self).items() if value is not None)

    @property
    def value(self) -> float:
        """Its value."""
        return getattr(self, self.name)


class Length:
    """The maps of a text of ``blocks`` blocks, its free blocks ranked by each head's gate."""

    def __init__(self, maps: Maps, blocks: int, row_exponent: float = ROW_EXPONENT) -> None:
        self.blocks = blocks
        block = maps.block_size
        rows = Rows.last(blocks * block[0], blocks * block[1])
        valid, own = rows.causal(block), rows.own(block)
        always = maps.knobs.always(own, valid)
        chosen = maps.rows < blocks
        rows = maps.rows[chosen]
        free = (valid & ~always)[rows]
        level = maps.log_share[:, chosen, :blocks] - row_exponent * (rows + 1.0).log()[:, None]
        level, order = level[:, free].sort(-1, descending=True)
        gain, mass = (m[:, chosen, :blocks] for m in (maps.gain, maps.mass))
        self.gained = _running_sum(gain[:, free].gather(1, order))
        self.found = _running_sum(mass[:, free].gather(1, order))
        self.rows = mass.shape[0] * mass.shape[1]
        self.kept = float((mass * always[rows]).sum())
        self.free = level.numel()
        # Negated, in the rising order that it is searched in.
        self.below = -torch.cat([level[:, :1] + 0.1, level, level[:, -1:] - 0.1], 1).double()
        slopes, widths = zip(*map(pieces, self.gained.numpy()), strict=True)
        slope, width = np.concatenate(slopes), np.concatenate(widths)
        dearest = (-slope).argsort(kind="stable")
        slope, self.width = slope[dearest], width[dearest]
        self.head = np.arange(len(slopes)).repeat(list(map(len, slopes)))[dearest]
        # Numbers of pieces that one price parts from the others; all that gain nothing come together.
        worth = slope[slope > NOTHING]
        self.cuts = [0, *(np.flatnonzero(np.diff(worth)) + 1).tolist(), len(worth), len(slope)]
        self.always = int(always.sum()) / int(valid.sum())

    def fraction(self, counts: Tensor) -> float:
        """Fraction of the free blocks taken."""
        return float(counts.sum()) / max(1, self.free)

    def density(self, counts: Tensor) -> float:
        """Fraction of all blocks read."""
        return self.always + (1 - self.always) * self.fraction(counts)

    def recall(self, counts: Tensor) -> float:
        """Share of the attention mass kept."""
        return (self.kept + float(self.found.gather(1, counts[:, None]).sum())) / self.rows

    def spend(self, measure: Callable[[Tensor], float], wanted: float) -> Tensor:
        """Return how many free blocks each head takes, int64 ``[A]``, for a measure to reach a value.

        The heads' marginal gains per block are equal, and as high as they may be.
        """
        place = bisect_left(self.cuts[:-1], wanted, key=lambda cut: measure(self._bought(cut)))
        return self._bought(self.cuts[place])

    def _bought(self, cut: int) -> Tensor:
        """Return how many free blocks each head takes with the dearest pieces, int64 ``[A]``."""
        heads = np.bincount(self.head[:cut], self.width[:cut], minlength=len(self.gained))
        return torch.from_numpy(heads).long()

    def limits(self, counts: Tensor) -> Tensor:
        """Return the level between the last block taken and the first one left, fp64 ``[A]``."""
        return -(self.below.gather(1, counts[:, None]) + self.below.gather(1, counts[:, None] + 1))[:, 0] / 2

    def counts(self, limits: Tensor) -> Tensor:
        """Return how many free blocks of each head are above its limit, int64 ``[A]``."""
        return (torch.searchsorted(self.below, -limits[:, None])[:, 0] - 1).clamp(0, self.gained.shape[1] - 1)


def _running_sum(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.double().cumsum(1), (1, 0))


def pieces(gained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the straight pieces of the least concave curve above a running sum: slopes and blocks of each.

    At a price per block the sum less the price is largest behind the last piece steeper than the price.

    Args:
        gained: fp64 ``[n + 1]``, from 0.
    """
    at = np.arange(len(gained))
    while True:
        width = np.diff(at)
        slope = np.diff(gained[at]) / width
        # A point not above the line between its neighbours is not on the curve.
        keep = slope[:-1] > slope[1:]
        if keep.all():
            return slope, width
        at = at[np.concatenate([[True], keep, [True]])]


def fit(maps: Maps, target: Target, row_exponent: float = ROW_EXPONENT) -> Calibration:
    """Fit the thresholds' laws to maps.

    Args:
        maps: From `record`.
        target: A density or a recall.
        row_exponent: See `Calibration`.

    Raises:
        ValueError: If the target is out of reach at the length of the maps; says what is reachable.
    """
    longest = maps.log_share.shape[2]
    blocks = sorted({max(4, round(longest * x)) for x in LENGTHS})
    lengths = [Length(maps, n, row_exponent) for n in blocks]
    good = _reachable(lengths, target, maps.block_size[1])
    if target.density is not None:
        wanted = [math.exp(log_free(target.density, length.always)) for length in good]
        # From what is left of the density at this length to all of it, which is left in long texts. The
        # law holds for any length and fraction, so lengths that do not reach the target tell of it too.
        near = np.geomspace(AROUND[0] * wanted[-1], AROUND[1] * target.density, FRACTIONS)
        points = [(length, near) for length in lengths]
    else:
        recall = target.value
        wanted = [length.fraction(length.spend(length.recall, recall)) for length in good]
        around = np.geomspace(*AROUND, FRACTIONS)
        points = [(length, around * fraction) for length, fraction in zip(good, wanted, strict=True)]
    laws = _laws(points)
    if target.density is None:
        # The fraction follows the length by a law too, which goes into those of the thresholds.
        slope, start = _line([math.log(length.blocks) for length in good], np.log(wanted))
        laws = laws @ torch.tensor([[1, 0, 0], [0, 1, 0], [start, slope, 0]], dtype=torch.float64)
    laws[:, 0] += _shift(good, laws, wanted, target)
    heads = laws.shape[0] // len(maps.layers)
    return Calibration(
        target=target.name,
        value=target.value,
        tokens=longest * maps.block_size[1],
        block_size=maps.block_size,
        row_exponent=row_exponent,
        density=target.density,
        laws={
            layer: tuple(tuple(law) for law in laws[i * heads : (i + 1) * heads].tolist())
            for i, layer in enumerate(maps.layers)
        },
    )


def _reachable(lengths: list[Length], target: Target, block: int) -> list[Length]:
    """Return the lengths at which the target leaves something to choose."""
    longest, tokens = lengths[-1], lengths[-1].blocks * block
    nothing = torch.zeros(len(longest.gained), dtype=torch.long)
    if target.density is not None:
        if target.density <= NEAREST * longest.always:
            raise too_sparse(target.density, longest.always, tokens)
        return [x for x in lengths if target.density > NEAREST * x.always]
    good = [x for x in lengths if target.value > x.recall(nothing) + 0.005]
    if longest not in good:
        raise ValueError(
            f"recall {target.value:.1%} needs no thresholds at {tokens:,} tokens: the blocks that are always "
            f"read alone keep {longest.recall(nothing):.1%}, so no less is reachable; ask for more"
        )
    return good


def too_sparse(density: float, always: float, tokens: int) -> ValueError:
    """Say that blocks which are always read leave too little of a density."""
    return ValueError(
        f"density {density:.1%} is out of reach at {tokens:,} tokens: the blocks that are always read are "
        f"{always:.1%} of all; ask for at least {NEAREST * always:.1%}, or calibrate on longer windows"
    )


def _laws(points: list[tuple[Length, np.ndarray]]) -> Tensor:
    """Return ``(a, b, s)`` of every head, fp64 ``[A, 3]``, from lengths and fractions to look at there."""
    x, limits = [], []
    for length, fractions in points:
        for fraction in fractions[fractions < 0.98]:
            x.append((1.0, math.log(length.blocks), math.log(fraction)))
            limits.append(length.limits(length.spend(length.fraction, fraction)))
    return torch.from_numpy(np.linalg.lstsq(np.array(x), torch.stack(limits).numpy(), rcond=None)[0].T.copy())


def _line(x: list[float], y: np.ndarray) -> tuple[float, float]:
    """Return slope and start of the line through points, flat through one."""
    slope = float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 0.0
    return slope, float(np.mean(y)) - slope * float(np.mean(x))


def _shift(lengths: list[Length], laws: Tensor, wanted: list[float], target: Target) -> float:
    """Return what to add to all laws so that the target is met in the mean over lengths."""
    shifts = []
    for length, fraction in zip(lengths, wanted, strict=True):
        limits = laws @ torch.tensor([1.0, math.log(length.blocks), math.log(fraction)], dtype=torch.float64)
        measure = length.fraction if target.density is not None else length.recall
        value = fraction if target.density is not None else target.value
        low, high = -8.0, 8.0
        for _ in range(30):
            middle = (low + high) / 2
            if measure(length.counts(limits + middle)) >= value:
                low = middle
            else:
                high = middle
        shifts.append((low + high) / 2)
    return float(np.mean(shifts))
