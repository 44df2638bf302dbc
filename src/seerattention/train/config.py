"""How joint training runs, and what its steps report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seerattention.train import objectives
from seerattention.train.loop import cosine_rate


@dataclass(frozen=True)
class FinetuneConfig:
    """How to train; a run is resumed only with the settings it was started with.

    Attributes:
        steps: Joint steps.
        lr: Peak learning rate of the model's weights, AdamW; it follows a cosine to zero.
        gate_lr: Peak learning rate of the gates, without weight decay.
        warmup: Share of the steps in which the rates rise linearly.
        weight_decay: Of the model's matrices.
        clip: Largest norm of the model's gradient; the gates' is not clipped, as in distillation.
        gate_weight: Factor of the gates' loss; 0 leaves them as they are. It matters only with
            ``soft_gates``, to the balance of both losses in the gates: without, the two losses reach
            different weights, and AdamW does not see the size of a gradient.
        density: Least and largest fraction of the causally valid blocks to read, in (0, 1]. Every step
            draws one, alike in the logarithm, so that gates serve all budgets between; 1 is dense.
        dense_share: Share of the steps, from the start, over which density falls linearly from 1 to
            what the step drew.
        soft_gates: Add the logarithm of a gate to the logits of each block (`soft.log_gates`): the
            language loss then reaches the gates.
        temperature: Of soft gates, in units of scores.
        objective: What the gates minimise, one of `objectives.names`.
        warmup_gate_steps: Steps before the joint ones in which the gates alone learn, from dense
            attention, as in distillation.
        save_every: Steps between checkpoints.
        grad_accum: Forward passes per optimizer step on each process.
        seed: Of the drawn densities and of the model's dropout.

    Source: joint training and the factor 10, the first version of SeerAttention (arXiv 2410.13276 v1);
    schedule, range of densities and soft gates are this project's (docs/method.md).
    """

    steps: int = 400
    lr: float = 1e-5
    gate_lr: float = 3e-3
    warmup: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    gate_weight: float = 10.0
    density: tuple[float, float] = (0.1, 0.1)
    dense_share: float = 0.0
    soft_gates: bool = False
    temperature: float = 1.0
    objective: str = "sharp_kl"
    warmup_gate_steps: int = 0
    save_every: int = 50
    grad_accum: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        whole_numbers = (("steps", 1), ("save_every", 1), ("grad_accum", 1), ("warmup_gate_steps", 0))
        for name, least in whole_numbers:
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        for name in ("lr", "gate_lr", "clip", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "gate_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if not 0 <= self.dense_share <= 1:
            raise ValueError(f"dense_share must be in [0, 1], got {self.dense_share}")
        least, most = self.density
        if not 0 < least <= most <= 1:
            raise ValueError(f"density must be one or two ascending numbers in (0, 1], got {least}:{most}")
        objectives.create(self.objective)

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rates in a step, counted from 0."""
        return cosine_rate(1.0, self.warmup, self.steps, step)

    def density_at(self, step: int) -> float:
        """Return the density of a step, counted from 0."""
        least, most = self.density
        drawn = least
        if least < most:
            place = float(np.random.default_rng((self.seed, step)).random())
            drawn = least * (most / least) ** place
        falling = self.dense_share * self.steps
        return 1 + (drawn - 1) * min(1.0, step / falling) if falling else drawn


@dataclass(frozen=True)
class JointStep:
    """What one joint step reports, the same on every process.

    Attributes:
        step: Joint steps done, this one included.
        loss: Mean cross-entropy of the global batch's tokens, in nats.
        gate_loss: Mean of the gates' objective over layers, without its factor; None where they do not learn.
        recall: Mean of `sampled_recall` over layers, at the step's density; None likewise.
        density: Fraction of the causally valid blocks asked for.
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
