"""The shapes that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seerattention.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one attention call.

    Attributes:
        name: Unique among the cases of an op.
        heads: Query heads, ``Hq``.
        kv_heads: KV heads, ``Hk``.
        queries: Query tokens, ``Tq``.
        keys: Key tokens, ``Tk``.
        head_dim: Dimension of a head, ``D``.
        batch: Sequences, ``B``.
        block_size: Tokens per (query block, KV block).
        lengths: (queries, keys) of sequences packed behind one another; they add up to ``queries`` and
            ``keys``. Empty for a batch of sequences of one length.
        large: For benchmarks: tests on a CPU leave it out of their list of cases.
    """

    name: str
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    batch: int = 1
    block_size: tuple[int, int] = (64, 64)
    lengths: tuple[tuple[int, int], ...] = ()
    large: bool = False

    def rows(self, device: torch.device | str = "cpu") -> Rows:
        """Return where the queries lie among the keys."""
        return Rows.packed(self.lengths, device) if self.lengths else Rows.last(self.queries, self.keys)
