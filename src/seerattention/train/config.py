"""How training runs: what both trainers share, and what each adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

#: Of all settings.
LARGEST = 1e37


@dataclass(frozen=True)
class TrainConfig:
    """What both trainers read; a run is resumed only with the settings it was started with.

    Attributes:
        steps: Optimizer steps.
        lr: Peak learning rate, it follows a cosine to zero; default 1e-3, and 3e-3 for gates that choose for
            decoding alone.
        warmup: Share of the steps in which the rate rises linearly, in [0, 1).
        objective: What the gates minimise: ``choice_kl``, or ``kl`` as published (docs/method.md).
        target: What they learn of a block: ``mass``, the sum of a query's weights in it, ``max``, its
            largest attention weight, as published, or ``both``, the mean of these two maps.
        save_every: Steps between checkpoints.
        grad_accum: Forward passes per optimizer step on each process; the sequences of a step are
            split over them, and the result is the same.
    """

    steps: int = 200
    lr: float | None = None
    warmup: float = 0.02
    objective: str = "choice_kl"
    target: str = "mass"
    save_every: int = 50
    grad_accum: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # NaN is in no range; what is larger is infinite in the optimizer's float32.
            fits = not isinstance(value, float) or -LARGEST < value < LARGEST
            self._check(fits, field.name, f"finite and below {LARGEST:g}")
        self._check_whole(1, "steps", "save_every", "grad_accum")
        self._check(self.lr is None or self.lr > 0, "lr", "above 0")
        self._check(0 <= self.warmup < 1, "warmup", "in [0, 1)")
        # Loads torch, which the help of a command does without.
        from seerattention.train import objectives
        from seerattention.train.target import TARGETS

        if "" in (self.objective, self.target):
            raise ValueError(
                "objective and target must be named; a file that leaves them empty meant sharp_kl and max, "
                "or for decoding alone choice_kl and mass"
            )
        self._check(self.target in TARGETS, "target", f"one of {', '.join(TARGETS)}")
        objectives.create(self.objective)

    def _check(self, right: bool, name: str, must: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {must}, got {getattr(self, name)!r}")

    def _check_whole(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            right = isinstance(value, int) and least <= value < 2**63
            self._check(right, name, f"a whole number >= {least}")

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rates in a step, counted from 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def density_at(self, step: int) -> float:
        """Return the density of a step, counted from 0: what is read, or what recall is measured at."""
        raise NotImplementedError


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """How gates are taught alone, by AdamW without weight decay.

    Attributes:
        recall_density: Density at which recall is reported, in (0, 1]; in short sequences that of three
            blocks a row, since any gate finds two.
        eval_every: Steps between measurements of recall on held-out text.
        patience: Measurements without a better recall after which training stops; 0 never stops early.

    Source: optimizer and schedule, SeerAttention, section 4 (arXiv 2410.13276), with ``kl`` and a rate of
        1e-3; the defaults' measurements, docs/method.md.
    """

    recall_density: float = 0.1
    eval_every: int = 50
    patience: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "eval_every")
        self._check_whole(0, "patience")
        self._check(0 < self.recall_density <= 1, "recall_density", "in (0, 1]")

    def peak(self, phase: str) -> float:
        """Return the peak learning rate of gates for a phase."""
        return self.lr or (3e-3 if phase == "decode" else 1e-3)

    def density_at(self, step: int) -> float:
        """Return the density at which recall is measured."""
        return self.recall_density


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """How a model and its gates are trained together.

    Attributes:
        steps: Joint steps.
        lr: Peak learning rate of the model's weights, AdamW; it follows a cosine to zero.
        gate_lr: Peak learning rate of the gates, without weight decay.
        weight_decay: Of the model's matrices.
        clip: Largest norm of the model's gradient; the gates' is not clipped, as in distillation.
        gate_weight: Factor of the gates' loss; 0 leaves them as they are. It matters only with
            ``soft_gates``, to the balance of both losses in the gates: without, the two losses reach
            different weights, and AdamW does not see the size of a gradient.
        density: Fraction of the causally valid blocks to read, in (0, 1], 1 is dense; or the least and
            the largest, of which every step draws one, alike in the logarithm, so that gates serve all
            budgets between.
        dense_share: Share of the steps, from the start, over which density falls linearly from 1 to
            what the step drew.
        soft_gates: Add the logarithm of a gate to the logits of each block it selects: the language loss
            then reaches the gates. For short sequences, on the reference backend.
        temperature: Of soft gates, in units of gate scores.
        warmup_gate_steps: Steps before the joint ones in which the gates alone learn, from dense
            attention, as in distillation.
        seed: Of new gates, adapters, drawn densities, dropout and the order of the text.

    Source: joint training and the factor 10, the first version of SeerAttention (arXiv 2410.13276 v1);
    schedule, range of densities and soft gates are this project's (docs/method.md).
    """

    steps: int = 400
    lr: float = 1e-5
    gate_lr: float = 3e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    gate_weight: float = 10.0
    density: float | tuple[float, float] = 0.1
    dense_share: float = 0.0
    soft_gates: bool = False
    temperature: float = 1.0
    warmup_gate_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(0, "warmup_gate_steps", "seed")
        for name in ("gate_lr", "clip", "temperature"):
            self._check(getattr(self, name) > 0, name, "above 0")
        for name in ("weight_decay", "gate_weight"):
            self._check(getattr(self, name) >= 0, name, "at least 0")
        self._check(0 <= self.dense_share <= 1, "dense_share", "in [0, 1]")
        least, most = self.densities
        self._check(0 < least <= most <= 1, "density", "one or two ascending numbers in (0, 1]")

    @property
    def densities(self) -> tuple[float, float]:
        """The least and the largest density."""
        return self.density if isinstance(self.density, tuple) else (self.density, self.density)

    def density_at(self, step: int) -> float:
        """Return the density of a step, counted from 0."""
        least, most = self.densities
        drawn = least
        if least < most:
            place = float(np.random.default_rng((self.seed, step)).random())
            drawn = least * (most / least) ** place
        falling = self.dense_share * self.steps
        return 1 + (drawn - 1) * min(1.0, step / falling) if falling else drawn


@dataclass(frozen=True)
class Step:
    """What one step of distillation reports, the same on every process.

    Attributes:
        step: Steps done, this one included.
        loss: Mean of the objective over layers and the global batch; of both phases the sum.
        recall: Mean of `sampled_recall` in prefill over layers and the global batch; None where the gates are
            not taught for it.
        tokens: Tokens read in this step by all processes.
        seconds: Time it took, without measurements on held-out text.
        heldout_recall: The same on held-out text after this step, or None where it was not measured.
        decode_recall: As ``recall``, in decoding.
        heldout_decode_recall: As ``heldout_recall``, in decoding.
    """

    step: int
    loss: float
    recall: float | None
    tokens: int
    seconds: float
    heldout_recall: float | None = None
    decode_recall: float | None = None
    heldout_decode_recall: float | None = None


@dataclass(frozen=True)
class JointStep:
    """What one joint step reports, the same on every process.

    Attributes:
        step: Joint steps done, this one included.
        loss: Mean cross-entropy of the global batch's tokens, in nats.
        gate_loss: Mean of the gates' objective over layers, without its factor; None where they do not learn.
        recall: Mean of `sampled_recall` over layers, at the step's density; None likewise.
        density: Fraction of the causally valid blocks asked for; short sequences cannot have every one.
        norm: Norm of the model's gradient before clipping.
        gate_norm: Norm of the gates' gradient.
        tokens: Tokens read in this step by all processes.
        seconds: Time it took.
    """

    step: int
    loss: float
    gate_loss: float | None
    recall: float | None
    density: float
    norm: float
    gate_norm: float
    tokens: int
    seconds: float
