"""Named calls of every op, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from seerattention.ops.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Shape):
    """A shape, as a rule of four heads of 64 numbers that share two, and what else is asked for.

    Attributes:
        keys: Key tokens; default as many as queries.
        softcap: Limit of the scores.
        sinks: Whether every head has a sink logit.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    keys: int = 0
    softcap: float | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", self.keys or self.queries)

    def asked(self, device: str, return_lse: bool) -> dict[str, Any]:
        """Return what `Options` is made of, tensors on a device."""
        sinks = torch.linspace(-1, 2, self.heads, device=device) if self.sinks else None
        asked = {"rows": self.rows(device), "scale": self.head_dim**-0.5, "softcap": self.softcap}
        return asked | {"sinks": sinks, "return_lse": return_lse}
