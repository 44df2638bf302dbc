"""Thresholds per layer and head that meet a target at any length, from what blocks gain.

Which blocks a density is best spent on is one Lagrangian: with a price per block, every head takes blocks
from its gate's best down to where their gain no longer pays, so that the marginal gain per block is the same
for all heads. Rows of a causal map do not see what comes later, so that one window holds the maps of all
shorter texts, and the law in the length is fitted to several of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.calibration.gains import Maps, record
from seerattention.hosts.transformers import Gates, attach, detach
from seerattention.measure.observe import Watch
from seerattention.measure.perplexity import perplexity
from seerattention.policies import Calibrated, Calibration, Policy, TopK
from seerattention.policies.calibrated import log_free
from seerattention.rows import Rows

#: Lengths that the law is fitted to, as shares of a window.
LENGTHS = (0.5, 0.625, 0.75, 0.875, 1.0)

#: Fractions of free blocks that the law is fitted to: from and to, relative to those asked for, and how many.
AROUND = (0.7, 1.4)
FRACTIONS = 5

#: Of the number of blocks that a row sees, in the thresholds; measured in docs/method.md.
ROW_EXPONENT = 0.0

#: How near a density may be to that of the blocks always read; closer, limits depend on a few blocks.
NEAREST = 1.25

#: For a rise of perplexity: the highest density that is tried, and how often the range below it is halved.
DENSEST = 0.9
SEARCHES = 6

#: Densities of the curve of the trade-off.
CURVE = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)

#: Query tokens per layer and window whose recall is measured.
RECALL_ROWS = 16


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


class _Length:
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
        self.level, order = level[:, free].sort(-1, descending=True)
        gain, mass = (m[:, chosen, :blocks] for m in (maps.gain, maps.mass))
        self.gained = _running_sum(gain[:, free].gather(1, order))
        self.found = _running_sum(mass[:, free].gather(1, order))
        self.rows = mass.shape[0] * mass.shape[1]
        self.kept = float((mass * always[rows]).sum())
        self.free = self.level.numel()
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
        index = torch.arange(self.gained.shape[1], dtype=self.gained.dtype)
        low, high = math.log(1e-16), math.log(1e4)
        counts = torch.full((self.gained.shape[0],), self.gained.shape[1] - 1)
        for _ in range(48):
            price = (low + high) / 2
            taken = (self.gained - math.exp(price) * index).argmax(1)
            if measure(taken) >= wanted:
                low, counts = price, taken
            else:
                high = price
        return counts

    def limits(self, counts: Tensor) -> Tensor:
        """Return the level between the last block taken and the first one left, fp64 ``[A]``."""
        padded = torch.cat([self.level[:, :1] + 0.1, self.level, self.level[:, -1:] - 0.1], 1).double()
        return (padded.gather(1, counts[:, None]) + padded.gather(1, counts[:, None] + 1))[:, 0] / 2

    def counts(self, limits: Tensor) -> Tensor:
        """Return how many free blocks of each head are above its limit, int64 ``[A]``."""
        return torch.searchsorted(-self.level.double(), -limits[:, None])[:, 0]


def _running_sum(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.double().cumsum(1), (1, 0))


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
    lengths = [_Length(maps, n, row_exponent) for n in blocks]
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
    lengths = good
    if target.density is None:
        # The fraction follows the length by a law too, which goes into those of the thresholds.
        slope, start = _line([math.log(length.blocks) for length in lengths], np.log(wanted))
        laws = laws @ torch.tensor([[1, 0, 0], [0, 1, 0], [start, slope, 0]], dtype=torch.float64)
    laws[:, 0] += _shift(lengths, laws, wanted, target)
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


def _reachable(lengths: list[_Length], target: Target, block: int) -> list[_Length]:
    """Return the lengths at which the target leaves something to choose."""
    nothing = torch.zeros(lengths[0].level.shape[0], dtype=torch.long)
    if target.density is not None:
        good = [x for x in lengths if target.density > NEAREST * x.always]
        least = lengths[-1].always
    else:
        good = [x for x in lengths if target.value > x.recall(nothing) + 0.005]
        least = lengths[-1].recall(nothing)
    if good and good[-1] is lengths[-1]:
        return good
    if target.density is not None:
        raise _too_sparse(target.density, least, lengths[-1].blocks * block)
    raise ValueError(
        f"recall {target.value:.1%} needs no thresholds at {lengths[-1].blocks * block:,} tokens: the blocks "
        f"that are always read alone keep {least:.1%}, so no less is reachable; ask for more"
    )


def _too_sparse(density: float, always: float, tokens: int) -> ValueError:
    return ValueError(
        f"density {density:.1%} is out of reach at {tokens:,} tokens: the blocks that are always read are "
        f"{always:.1%} of all; ask for at least {NEAREST * always:.1%}, or calibrate on longer windows"
    )


def _laws(points: list[tuple[_Length, np.ndarray]]) -> Tensor:
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


def _shift(lengths: list[_Length], laws: Tensor, wanted: list[float], target: Target) -> float:
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


def measure(
    model: PreTrainedModel, gates: Gates, policy: Policy, windows: list[np.ndarray]
) -> dict[str, float]:
    """Run windows of text sparsely and return density, recall and perplexity.

    Args:
        model: The base model, nothing attached.
        gates: Its gates.
        policy: What to read.
        windows: int ``[T]`` each, all of one length.
    """
    watch = Watch(RECALL_ROWS)
    attach(model, gates, policy, min_tokens=0, observe=watch)
    try:
        found = perplexity(model, np.concatenate(windows), window=len(windows[0]), windows=len(windows))
    finally:
        detach(model)
    return {"density": watch.density, "recall": watch.recall, "perplexity": found}


@dataclass(frozen=True)
class Outcome:
    """What `calibrate` found.

    Attributes:
        policy: The calibrated policy.
        rows: Measured on windows that nothing was fitted to, one row per length, half and whole: ``tokens``,
            ``density``, ``recall``, ``perplexity``, ``dense_perplexity``.
        curve: What other densities would give, ``{"density", "recall"}`` each, from the true maps.
        head_densities: Of every head at the calibrated length, from the maps: ``[layers, heads]``.
    """

    policy: Calibrated
    rows: list[dict[str, float]]
    curve: list[dict[str, float]]
    head_densities: list[list[float]]

    def recommendation(self) -> str:
        """Return in a sentence what the policy does."""
        row = self.rows[-1]
        rise = row["perplexity"] / row["dense_perplexity"] - 1
        text = (
            f"reads {row['density']:.1%} of the blocks at {row['tokens']:,.0f} tokens, keeps "
            f"{row['recall']:.1%} of the attention, perplexity {rise:+.1%}: "
        )
        if rise <= 0.01:
            return text + "use it as it is"
        if rise <= 0.03:
            return text + "fine for most uses; check retrieval on your own prompts"
        return text + "a higher density is worth its time where quality matters"


def calibrate(
    model: PreTrainedModel,
    gates: Gates,
    tokens: np.ndarray,
    target: Target,
    *,
    length: int = 8192,
    windows: int = 4,
    knobs: Policy | None = None,
    progress: Callable[[str, int], Callable[[], None]] | None = None,
) -> Outcome:
    """Find thresholds that meet a target, and measure them on windows that nothing was fitted to.

    Args:
        model: The base model, nothing attached.
        gates: Its gates.
        tokens: int ``[n]``, at least ``windows * length``; the last quarter of the windows, one at least, is
            for measuring.
        target: What to meet.
        length: Tokens per window.
        windows: How many, at least 2.
        knobs: A policy with the sink and local blocks and dense last rows to use; default one sink block.
        progress: Called with a phase and its number of steps; returns what is called after each.

    Raises:
        FloatingPointError: If scores or attention are not finite.
        ValueError: If the text is too short, the length past the model's limit, the gates are another
            model's, or the target is out of reach.
    """
    _check(model, gates, tokens, length, windows)
    knobs = knobs or TopK(1.0, sink_blocks=1)
    always = knobs.always_density(length // gates.config.block_size)
    density = target.density if target.ppl_increase is None else DENSEST
    if density is not None and density <= NEAREST * always:
        raise _too_sparse(density, always, length)
    texts = [tokens[i * length : (i + 1) * length] for i in range(windows)]
    held = max(1, windows // 4)
    texts, held_texts = texts[:-held], texts[-held:]
    say = progress or (lambda phase, steps: lambda: None)
    maps = record(model, gates, texts, knobs, say("true maps", len(texts) * len(gates.layers)))
    dense = perplexity(model, np.concatenate(held_texts), window=length, windows=held)
    if not math.isfinite(dense):
        raise FloatingPointError("the model's own perplexity is not finite; load it in float32 or bfloat16")
    if target.ppl_increase is None:
        policy = _policy(fit(maps, target), knobs)
    else:
        policy = _within(model, gates, maps, target, held_texts, dense, say)
    step, rows = say("measuring", 2), []
    for share in (2, 1):
        cut = [text[: length // share] for text in held_texts]
        base = (
            dense if share == 1 else perplexity(model, np.concatenate(cut), window=len(cut[0]), windows=held)
        )
        rows.append({"tokens": len(cut[0]), **measure(model, gates, policy, cut), "dense_perplexity": base})
        step()
    return Outcome(policy, rows, *trade_off(maps, policy))


def _policy(calibration: Calibration, knobs: Policy) -> Calibrated:
    return Calibrated(calibration, **{name: getattr(knobs, name) for name in Policy.knobs()})


def _check(model: PreTrainedModel, gates: Gates, tokens: np.ndarray, length: int, windows: int) -> None:
    """Refuse what cannot be calibrated before anything is computed."""
    block = gates.config.block_size
    if windows < 2:
        raise ValueError(f"windows must be at least 2, one of them is for measuring, got {windows}")
    if length % block or length < 16 * block:
        raise ValueError(
            f"length must be a multiple of the gates' block of {block} tokens and at least 16 of them, "
            f"{16 * block}, got {length}"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise ValueError(f"length {length} is past the model's limit of {limit} tokens; choose a shorter one")
    if len(tokens) < windows * length:
        raise ValueError(
            f"the text has {len(tokens):,} tokens, {windows} windows of {length:,} need "
            f"{windows * length:,}; give more text, fewer windows or a shorter length"
        )
    # Attaching refuses gates that are not this model's.
    detach(attach(model, gates, "top_k:1"))


def _within(
    model: PreTrainedModel,
    gates: Gates,
    maps: Maps,
    target: Target,
    texts: list[np.ndarray],
    dense: float,
    say: Callable[[str, int], Callable[[], None]],
) -> Calibrated:
    """Return the policy of the least density whose perplexity is within the target."""
    always = maps.knobs.always_density(maps.log_share.shape[2])
    # A little above what `fit` takes.
    low, high = math.log(min(1.01 * NEAREST * always, DENSEST)), math.log(DENSEST)
    step = say("perplexity", SEARCHES + 1)

    def at(log_density: float) -> tuple[Calibrated, float]:
        policy = _policy(fit(maps, Target(density=math.exp(log_density))), maps.knobs)
        rise = measure(model, gates, policy, texts)["perplexity"] / dense - 1
        step()
        return policy, rise

    best, rise = at(high)
    if rise > target.value:
        raise ValueError(
            f"a perplexity increase of {target.value:.1%} is out of reach: at a density of "
            f"{math.exp(high):.0%} it is {rise:.1%}, the best that these gates reach; distil them longer, or "
            "allow more"
        )
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        policy, rise = at(middle)
        if rise <= target.value:
            high, best = middle, policy
        else:
            low = middle
    calibration = replace(best.calibration, target=target.name, value=target.value)
    return replace(best, calibration=calibration)


def trade_off(maps: Maps, policy: Calibrated) -> tuple[list[dict[str, float]], list[list[float]]]:
    """Return recall against density of the best thresholds, and each head's density under a policy.

    Args:
        maps: From `record`; both are for their length.
        policy: Calibrated on them.
    """
    length = _Length(maps, maps.log_share.shape[2])
    curve = []
    for density in CURVE:
        if density > length.always:
            counts = length.spend(length.density, density)
            curve.append({"density": length.density(counts), "recall": length.recall(counts)})
    seen = torch.ones(1, dtype=torch.long)
    limits = [policy.at(layer, None).log_limits(length.blocks, seen)[:, 0] for layer in maps.layers]
    taken = length.counts(torch.cat(limits).double()) / length.level.shape[1]
    heads = length.always + (1 - length.always) * taken
    return curve, heads.unflatten(0, (len(maps.layers), -1)).tolist()
