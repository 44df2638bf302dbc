"""Named calls of `rotate_back`, for its tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        name: Unique among the cases.
        tokens: Tokens, ``T``.
        heads: Heads of x.
        dim: Dimension of a head, ``D``.
        turned: Pairs that were turned, ``R``; 0 for all.
        batch: Sequences.
        each: Whether every sequence has angles of its own.
        stretched: By how much the rotation stretched.
    """

    name: str
    tokens: int
    heads: int = 2
    dim: int = 32
    turned: int = 0
    batch: int = 1
    each: bool = False
    stretched: float = 1.0

    def angles(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Draw cosines and sines, as one table holds them: halves of its rows."""
        angle = torch.rand(self.batch if self.each else 1, self.tokens, self.turned or self.dim // 2) * 6
        table = torch.cat((angle.cos(), angle.sin()), -1) * self.stretched
        cos, sin = table.to(device, dtype).chunk(2, -1)
        return cos, sin

    def x(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        """Draw vectors, heads after tokens in memory and beside others, as a fused projection leaves them."""
        wide = torch.randn(self.batch, self.tokens, self.heads + 3, self.dim).to(device, dtype)
        return wide[:, :, 1 : 1 + self.heads].transpose(1, 2)


CASES = (
    Case(name="one-token", tokens=1),
    Case(name="tile-plus-one", tokens=17, heads=9),
    Case(name="several", tokens=100, batch=3, each=True, dim=64),
    Case(name="one-table", tokens=40, batch=2, heads=8, dim=128),
    Case(name="part-of-a-head", tokens=33, dim=80, turned=16),
    Case(name="stretched", tokens=50, dim=96, stretched=1.3),
    Case(name="not-a-power-of-two", tokens=31, dim=112, turned=40, batch=2, each=True, stretched=0.8),
)
