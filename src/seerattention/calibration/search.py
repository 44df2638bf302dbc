"""From a text to a calibrated policy: record maps, fit thresholds, measure them on other text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from seerattention.calibration.fit import NEAREST, Length, Target, fit, too_sparse
from seerattention.calibration.gains import Maps, record
from seerattention.hosts.transformers import Gates, attach, detach
from seerattention.measure.compare import measured
from seerattention.policies import Calibrated, Calibration, Policy, TopK
from seerattention.policies.base import SHORT
from seerattention.rows import num_blocks

#: For a rise of perplexity: the highest density that is tried, and how often the range below it is halved.
DENSEST = 0.9
SEARCHES = 6

#: Densities of the curve of the trade-off.
CURVE = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)

#: Query tokens per layer and window whose recall is measured.
RECALL_ROWS = 16


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
        """Return in a sentence what the policy does, and what to do about it where that was not asked for."""
        row = self.rows[-1]
        rise = row["perplexity"] / row["dense_perplexity"] - 1
        text = (
            f"reads {row['density']:.1%} of the blocks at {row['tokens']:,.0f} tokens, keeps "
            f"{row['recall']:.1%} of the attention, perplexity {rise:+.1%}: "
        )
        if missed := self.missed():
            text += missed
        elif rise <= 0.01:
            text += "use it as it is"
        elif rise <= 0.03:
            text += "fine for most uses; check retrieval on your own prompts"
        else:
            text += "a higher density is worth its time where quality matters"
        return "; ".join([text, *self.floors()])

    def floors(self) -> list[str]:
        """Return a sentence for each length at which blocks always read are more than a density asked for."""
        asked = self.policy.calibration.value
        return [
            f"at {row['tokens']:,.0f} tokens it reads {row['density']:.1%}, which is the floor and no miss: "
            f"the blocks that are always read are {self._always(row):.1%} of all there, more than the "
            f"{asked:.1%} asked for"
            for row in self.rows
            if self._at_floor(row)
        ]

    def _always(self, row: dict[str, float]) -> float:
        """Return the density of what is always read at a row's length."""
        return self.policy.always_density(
            num_blocks(int(row["tokens"]), self.policy.calibration.block_size[1])
        )

    def _at_floor(self, row: dict[str, float]) -> bool:
        """Whether no thresholds could read as little as was asked for, and these read hardly more."""
        made, always = self.policy.calibration, self._always(row)
        return made.target == "density" and made.value < always and row["density"] <= (1 + SHORT) * always

    def missed(self) -> str | None:
        """Return in a sentence that the target was missed at a length, and the remedy; None if it was met.

        A density that the length is too short for is not missed: see `floors`.
        """
        target, asked = self.policy.calibration.target, self.policy.calibration.value
        for row in reversed(self.rows):
            rise = row["perplexity"] / row["dense_perplexity"] - 1
            found, off = {
                "density": (row["density"], abs(row["density"] - asked) / asked),
                "recall": (row["recall"], (asked - row["recall"]) / (1 - asked)),
                "ppl_increase": (rise, (rise - asked) / asked),
            }[target]
            if off <= SHORT or self._at_floor(row):
                continue
            said = (
                f"{asked:.1%} was asked for and missed at {row['tokens']:,.0f} tokens, where it is "
                f"{found:.1%}; thresholds depend on the text: calibrate on more windows, of text and length "
                "like your prompts"
            )
            if target == "density":
                said += f", or use top_k:{asked:g}, which reads as much of any text"
            return said
        return None


def calibrate(
    model: PreTrainedModel,
    gates: Gates,
    tokens: np.ndarray,
    target: Target,
    *,
    length: int = 8192,
    windows: int = 4,
    knobs: Policy | None = None,
    mix: Callable[[list[np.ndarray]], list[np.ndarray]] | None = None,
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
        mix: Changes the windows that are fitted to, such as `seerattention.train.mixture.mixed`; those for
            measuring stay as they are.
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
        raise too_sparse(density, always, length)
    texts = [tokens[i * length : (i + 1) * length] for i in range(windows)]
    held = max(1, windows // 4)
    texts, held_texts = texts[:-held], texts[-held:]
    if mix is not None:
        texts = mix(texts)
    say = progress or (lambda phase, steps: lambda: None)
    maps = record(model, gates, texts, knobs, say("true maps", len(texts) * len(gates.layers)))
    dense = measured(model, None, windows=held_texts).values()["perplexity"]
    if not math.isfinite(dense):
        raise FloatingPointError("the model's own perplexity is not finite; load it in float32 or bfloat16")
    if target.ppl_increase is None:
        policy = _policy(fit(maps, target), knobs)
    else:
        policy = _within(model, gates, maps, target, held_texts, dense, say)
    step, rows = say("measuring", 2), []
    for share in (2, 1):
        cut = [text[: length // share] for text in held_texts]
        base = dense if share == 1 else measured(model, None, windows=cut).perplexity
        found = measured(model, gates, policy, windows=cut, recall_rows=RECALL_ROWS).values()
        kept = {name: found[name] for name in ("tokens", "density", "recall", "perplexity")}
        rows.append({**kept, "dense_perplexity": base})
        step()
    return Outcome(policy, rows, *trade_off(maps, policy))


def _policy(calibration: Calibration, knobs: Policy) -> Calibrated:
    return Calibrated(calibration, **{name: getattr(knobs, name) for name in Policy.KNOBS})


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
        rise = measured(model, gates, policy, windows=texts).values()["perplexity"] / dense - 1
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
    length = Length(maps, maps.log_share.shape[2])
    curve = []
    for density in CURVE:
        if density > length.always:
            counts = length.spend(length.density, density)
            curve.append({"density": length.density(counts), "recall": length.recall(counts)})
    # No row exponent: what rows see is in the levels already.
    rules = [policy.at(layer).rule(length.blocks, maps.block_size[1]) for layer in maps.layers]
    limits = torch.tensor([limit for rule in rules for limit in rule.per_head], dtype=torch.float64).log()
    taken = length.counts(limits) / (length.gained.shape[1] - 1)
    heads = length.always + (1 - length.always) * taken
    return curve, heads.unflatten(0, (len(maps.layers), -1)).tolist()
