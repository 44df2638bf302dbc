"""Named calls of every op, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from seerattention.ops.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Shape):
    """A shape, and what else is asked for.

    Attributes:
        softcap: Limit of the scores.
        sinks: Whether every head has a sink logit.
    """

    softcap: float | None = None
    sinks: bool = False

    def asked(self, device: str, return_lse: bool) -> dict[str, Any]:
        """Return what `Options` is made of, tensors on a device."""
        sinks = torch.linspace(-1, 2, self.heads, device=device) if self.sinks else None
        asked = {"rows": self.rows(device), "scale": self.head_dim**-0.5, "softcap": self.softcap}
        return asked | {"sinks": sinks, "return_lse": return_lse}
