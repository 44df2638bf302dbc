"""Named calls of `summarise_blocks`, for its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from seerattention.rows import Rows, num_blocks


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        name: Unique among the cases.
        tokens: Tokens, ``T``.
        size: Tokens per block.
        pools: In the order of their concatenation.
        heads: Heads of x.
        heads_out: Heads of the projection; 0 for none.
        width: Dimension of a head, ``D``.
        dim: Dimension of a summary, ``E``.
        batch: Sequences.
        norm: With an RMS norm.
        rope: With a rotation.
        lengths: Tokens of sequences packed behind one another, which add up to ``tokens``; empty for none.
    """

    name: str
    tokens: int
    size: int = 8
    pools: tuple[str, ...] = ("max", "min", "avg")
    heads: int = 2
    heads_out: int = 2
    width: int = 32
    dim: int = 32
    batch: int = 1
    norm: bool = False
    rope: bool = True
    lengths: tuple[int, ...] = ()

    @property
    def rows(self) -> Rows | None:
        """Where packed sequences lie."""
        return Rows.packed([(n, n) for n in self.lengths]) if self.lengths else None

    @property
    def blocks(self) -> int:
        """Blocks of all sequences, ``N``."""
        return sum(num_blocks(n, self.size) for n in self.lengths or (self.tokens,))


CASES = (
    Case(name="one-token", tokens=1),
    Case(name="below-block", tokens=63, size=64),
    Case(name="one-block", tokens=64, size=64),
    Case(name="block-plus-one", tokens=65, size=64),
    Case(name="thousand", tokens=1000, batch=2),
    Case(name="sixteen", tokens=1000, size=16),
    Case(name="published-queries", tokens=300, size=64, pools=("avg",), heads_out=0),
    Case(name="published-keys", tokens=300, size=64, heads_out=8),
    Case(name="one-pool", tokens=200, pools=("min",)),
    Case(name="pools-alone", tokens=300, heads_out=0, dim=96, rope=False, batch=2),
    Case(name="two-pools-alone", tokens=200, pools=("avg", "min"), heads_out=0, width=24, rope=False),
    Case(name="largest-only", tokens=200, pools=("max",), heads_out=0, norm=True),
    Case(name="other-order", tokens=200, pools=("avg", "max")),
    Case(name="odd-size", tokens=100, size=6),
    Case(name="norm", tokens=300, norm=True),
    Case(name="norm-without-rope", tokens=130, norm=True, rope=False, batch=3),
    Case(name="narrow", tokens=130, dim=16, width=64),
    Case(name="wide", tokens=130, width=128, dim=128),
    Case(name="not-a-power-of-two", tokens=130, width=80, dim=96, norm=True),
    Case(name="packed", tokens=152, lengths=(1, 7, 8, 0, 9, 63, 64), norm=True),
    Case(name="packed-pools", tokens=75, size=16, lengths=(40, 35), heads_out=0, rope=False),
    Case(name="odd-dimension", tokens=130, width=33, dim=21, rope=False, norm=True),
)
