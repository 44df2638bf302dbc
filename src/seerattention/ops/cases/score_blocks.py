"""Named calls of `score_blocks`, for its tests and its benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seerattention.rows import Rows, num_blocks


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        name: Unique among the cases.
        heads: Heads of queries, ``H``.
        kv_heads: Heads of keys, ``Hk``.
        queries: Summaries of queries, ``Sq``.
        keys: Summaries of keys, ``Sk``.
        dim: Dimension of a summary, ``E``.
        sub_blocks: Summaries per (query block, KV block).
        causal: Whether pairs that lie after their queries are left out.
        batch: Sequences.
        large: For benchmarks and GPUs.
    """

    name: str
    heads: int = 2
    kv_heads: int = 1
    queries: int
    keys: int
    dim: int = 16
    sub_blocks: tuple[int, int]
    causal: bool = True
    batch: int = 1
    large: bool = False

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        """Shape of the scores."""
        rows, columns = (
            num_blocks(n, s) for n, s in zip((self.queries, self.keys), self.sub_blocks, strict=True)
        )
        return self.batch, self.heads, rows, columns

    @property
    def geometry(self) -> dict[str, Any]:
        """Blocks and rows of the call: as few tokens per summary as give both sides blocks of one size."""
        size = math.lcm(*self.sub_blocks)
        queries, keys = (
            n * size // s for n, s in zip((self.queries, self.keys), self.sub_blocks, strict=True)
        )
        rows = Rows.last(min(queries, keys), keys) if self.causal else None
        return {"rows": rows, "block_size": (size, size)}

    def whole(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and a gradient of whole numbers, whose products and sums are exact.

        Many products are equal, so that the rule for equals decides.
        """
        draw = torch.Generator().manual_seed(0)

        def integers(*shape: int) -> Tensor:
            return torch.randint(-2, 3, shape, generator=draw).to(device, dtype)

        q = integers(self.batch, self.heads, self.queries, self.dim)
        k = integers(self.batch, self.kv_heads, self.keys, self.dim)
        return q, k, integers(*self.blocks).float()

    def normal(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return normal queries and keys, and a normal gradient of the size that a mean has.

        Where the two best pairs of a block are so close that rounding may choose either, it is 0.
        """
        draw = torch.Generator().manual_seed(0)
        q = torch.randn(self.batch, self.heads, self.queries, self.dim, generator=draw).to(dtype)
        k = torch.randn(self.batch, self.kv_heads, self.keys, self.dim, generator=draw).to(dtype)
        gradient = torch.randn(self.blocks, generator=draw) / (self.heads * self.blocks[2])
        q, k, gradient = (x.to(device) for x in (q, k, gradient))
        return q, k, gradient * self._clear(q.double(), k.double())

    def _clear(self, q: Tensor, k: Tensor) -> Tensor:
        """Mark the blocks whose best pair is ahead of the others by more than any rounding."""
        _, _, rows, columns = self.blocks
        found = torch.ones(self.blocks, dtype=torch.bool, device=q.device)
        (subs_q, subs_k), pairs = self.sub_blocks, self.sub_blocks[0] * self.sub_blocks[1]
        if pairs == 1:
            return found
        group = self.heads // self.kv_heads
        for head in range(self.heads):
            products = q[:, head] @ k[:, head // group].mT
            pad = (0, columns * subs_k - self.keys, 0, rows * subs_q - self.queries)
            products = torch.nn.functional.pad(products, pad, value=float("-inf"))
            tiles = products.unflatten(2, (-1, subs_k)).unflatten(1, (-1, subs_q)).transpose(2, 3)
            best = tiles.flatten(3).topk(2).values
            found[:, head] = best[..., 0] - best[..., 1] > 1e-3
        return found


#: Of blocks of 16 tokens: one token, a token more than a block, no queries, a later piece, an odd length.
PACKED = ((1, 1), (17, 17), (0, 40), (20, 75), (63, 63))


def packed(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Rows, dict[str, Any], Tensor, Tensor]:
    """Return rows of `PACKED`, the other options, and summaries of 4 and 8 tokens in whole numbers."""
    rows, draw = Rows.packed(PACKED, device), torch.Generator().manual_seed(0)
    summaries = rows.places(rows.num_queries, 4)[-1].stop
    q = torch.randint(-2, 3, (1, 4, summaries, 16), generator=draw).to(device, dtype)
    k = torch.randint(-2, 3, (len(PACKED), 2, 10, 16), generator=draw).to(device, dtype)
    return rows, {"sub_blocks": (4, 2), "block_size": (16, 16)}, q, k


def _llama(name: str, tokens: int) -> Case:
    subs = tokens // 8
    return Case(
        name=name, heads=32, kv_heads=8, queries=subs, keys=subs, dim=128, sub_blocks=(8, 8), large=True
    )


CASES = (
    Case(name="one-summary", queries=1, keys=1, sub_blocks=(1, 1)),
    Case(name="one-short-block", queries=3, keys=5, sub_blocks=(8, 8)),
    Case(name="no-sub-blocks", queries=40, keys=40, sub_blocks=(1, 1), batch=2),
    Case(name="eight", queries=133, keys=133, sub_blocks=(8, 8)),
    Case(name="uneven", queries=70, keys=140, sub_blocks=(4, 8)),
    Case(name="four", queries=70, keys=70, sub_blocks=(4, 4), heads=4),
    Case(name="sixteen", queries=143, keys=143, sub_blocks=(16, 16)),
    Case(name="more-than-a-byte", queries=64 + 9, keys=16, sub_blocks=(64, 8), heads=1),
    Case(name="later-rows", queries=41, keys=163, sub_blocks=(2, 4)),
    Case(name="every-pair", queries=41, keys=90, sub_blocks=(2, 3), causal=False),
    Case(name="no-groups", queries=70, keys=70, sub_blocks=(4, 4), heads=2, kv_heads=2),
    Case(name="not-a-power-of-two", queries=70, keys=70, sub_blocks=(4, 4), dim=24),
    _llama("llama-8b-8k", 8192),
    _llama("llama-8b-32k", 32768),
    _llama("llama-8b-64k", 65536),
)
