"""Calibrated: a threshold per layer and head, by a law in the text's length that was fitted to a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from seerattention.policies.base import Policy, Rule

#: What a text is calibrated for: a fraction of blocks read, a share of attention mass kept, or the most
#: that perplexity may rise.
TARGETS = ("density", "recall", "ppl_increase")


@dataclass(frozen=True)
class Calibration:
    """Fitted laws of thresholds; made by ``seerattention calibrate``.

    A head takes the blocks whose logarithm of the share in the row's softmax is above
    ``a + b ln N + s ln f(N) + row_exponent ln n``, for a row that sees ``n`` of the prompt's ``N`` blocks.
    ``f(N)`` is the fraction of the blocks not read anyway that the density leaves; without a density the
    term is left out.

    Attributes:
        target: One of ``TARGETS``.
        value: Of the target, e.g. 0.1.
        tokens: Longest text that was calibrated on, in tokens.
        block_size: Tokens per (query block, KV block).
        row_exponent: Of the number of blocks that a row sees.
        density: Density that the thresholds are for at any length, or None if the law has it follow the
            length, as a recall needs.
        laws: By layer, ``(a, b, s)`` of each head of the gate's scores.
    """

    target: str
    value: float
    tokens: int
    block_size: tuple[int, int]
    row_exponent: float
    density: float | None
    laws: Mapping[int, tuple[tuple[float, float, float], ...]] = field(hash=False)

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        numbers = [
            self.value,
            self.row_exponent,
            *(x for heads in self.laws.values() for h in heads for x in h),
        ]
        if not self.laws or not all(map(math.isfinite, numbers)):
            raise ValueError("a calibration needs a finite law for every head")

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as plain JSON types."""
        laws = {str(layer): [list(law) for law in heads] for layer, heads in self.laws.items()}
        return {**vars(self), "block_size": list(self.block_size), "laws": laws}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: If a value is missing, not known or of another form.
        """
        names = set(cls.__dataclass_fields__)
        if set(data) != names:
            raise ValueError(f"its keys must be {', '.join(sorted(names))}, got {', '.join(sorted(data))}")
        try:
            rows, columns = (int(x) for x in data["block_size"])
            laws = {}
            for layer, heads in data["laws"].items():
                laws[int(layer)] = tuple((float(a), float(b), float(s)) for a, b, s in heads)
            numbers = {name: float(data[name]) for name in ("value", "row_exponent")}
            density = None if data["density"] is None else float(data["density"])
            return cls(
                **numbers,
                target=data["target"],
                tokens=int(data["tokens"]),
                block_size=(rows, columns),
                density=density,
                laws=laws,
            )
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a value has another form than a calibration's ({error})") from error


@dataclass(frozen=True)
class Calibrated(Policy):
    """Take blocks above a threshold of their head's own that follows the length of the text.

    The calibration is saved with the gates, so its text form, ``calibrated``, is understood where gates
    are: `attach`, and `load_gates`. Like `TopK` it counts the blocks present, or those of the whole prompt.

    Attributes:
        calibration: The fitted laws.
        layer: The layer whose laws apply; set by `at`.
    """

    name: ClassVar[str] = "calibrated"
    decodes: ClassVar[bool] = False
    calibration: Calibration
    layer: int | None = None

    @classmethod
    def form(cls) -> str:
        """Return how this policy is written, ``calibrated``."""
        return cls.name

    def __str__(self) -> str:
        return ",".join([self.name, *self.changed_knobs()])

    def at(self, layer: int) -> Calibrated:
        """Return the policy with the laws of a layer; see `Policy.at`.

        Raises:
            ValueError: If the layer was not calibrated.
        """
        if layer not in self.calibration.laws:
            raise ValueError(
                f"layer {layer} has no calibrated thresholds, layers {sorted(self.calibration.laws)} have; "
                "calibrate these gates"
            )
        return replace(self, layer=layer)

    def asked_density(self, num_blocks: int, block_tokens: int) -> float | None:
        """Return the density calibrated for, if it is one."""
        return self.calibration.density

    def expected_density(self, num_blocks: int, block_tokens: int) -> float | None:
        """Return the density calibrated for, if it is one; see `Policy.expected_density`."""
        if self.calibration.density is None:
            return None
        return max(self.calibration.density, self.always_density(num_blocks))

    def rule(self, num_blocks: int, block_tokens: int) -> Rule:
        """Return the rule in a layer; see `Policy.rule`.

        Raises:
            ValueError: If no layer was chosen by `at`.
        """
        if self.layer is None:
            raise ValueError("calibrated thresholds belong to a layer; choose one by at(layer)")
        density, always = self.calibration.density, self.always_density(num_blocks)
        free = 0.0 if density is None or always >= 1 else log_free(density, always)
        logs = (a + b * math.log(num_blocks) + s * free for a, b, s in self.calibration.laws[self.layer])
        # Within what fp32 holds: no share is above such a limit, or below it.
        limits = tuple(math.exp(min(80.0, max(-100.0, x))) for x in logs)
        return Rule("share", 0.0, limits, self.calibration.row_exponent)


def log_free(density: float, always: float) -> float:
    """Return the logarithm of what a density leaves of the blocks that are not always read.

    Args:
        density: Fraction of all blocks.
        always: Fraction of all blocks that is always read, below 1.
    """
    # Where nothing is left no head takes anything; finite, for products with slopes of zero.
    return math.log(max((density - always) / (1 - always), 1e-6))
