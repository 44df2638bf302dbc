"""Named calls of `block_sparse_decode`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattention.ops.cases import AttentionCase
from seerattention.ops.options import DecodeOptions
from seerattention.rows import num_blocks


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """A cache of ``keys`` tokens a sequence, what it holds, and a selection on it.

    Attributes:
        queries: Tokens that are decoded at once.
        held: Keys of every sequence; default as many as the cache has room for.
        starts: Where in the cache each sequence's first key lies; default 0.
        page: Tokens per page, a multiple of a block; None for a cache without pages.
        density: Fraction of the earlier blocks that are selected.
        selection_heads: Heads of the selection; default one per KV head.
    """

    queries: int = 1
    block_size: tuple[int, int] = (1, 64)
    held: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    page: int | None = None
    density: float = 0.3
    selection_heads: int | None = None

    @property
    def positions(self) -> Tensor:
        """Position of every query, int64 ``[B, Tq]``; negative where there are fewer keys."""
        held = torch.tensor(self.held or (self.keys,) * self.batch)
        return held[:, None] + torch.arange(self.queries) - self.queries

    def pages(self) -> Tensor | None:
        """Return a block table whose pages lie in no order, int32 ``[B, N]``; None without pages."""
        if self.page is None:
            return None
        each = num_blocks(self.keys, self.page)
        order = torch.randperm(self.batch * each, generator=torch.Generator().manual_seed(1))
        return order.to(torch.int32).view(self.batch, each)

    def options(self, device: str = "cpu", *, return_lse: bool = False) -> DecodeOptions:
        """Return the options of the case, its tensors on a device."""
        held, starts = (
            torch.tensor(x, dtype=torch.int32, device=device) if x else None for x in (self.held, self.starts)
        )
        pages = self.pages()
        return DecodeOptions(
            **self.asked(device, return_lse),
            lengths=held,
            pages=None if pages is None else pages.to(device),
            starts=starts,
        )


CASES = (
    Case(name="one-token", keys=640),
    Case(name="unfinished-block", keys=601),
    Case(name="within-a-block", keys=40),
    Case(name="drafted", queries=4, keys=450, selection_heads=2),
    Case(name="ragged", batch=3, keys=512, held=(512, 70, 1)),
    Case(name="empty", batch=3, queries=2, keys=256, held=(0, 1, 256)),
    Case(name="padded", batch=4, queries=2, keys=512, held=(512, 300, 70, 1), starts=(0, 212, 100, 511)),
    Case(name="own-lists", keys=320, selection_heads=4),
    Case(name="one-list", batch=2, keys=320, selection_heads=1),
    Case(name="big-group", heads=20, kv_heads=1, keys=200, head_dim=80),
    Case(name="wide-96", keys=200, head_dim=96),
    Case(name="wide-128", keys=400, head_dim=128),
    Case(name="wide-256", heads=2, kv_heads=1, keys=150, head_dim=256),
    Case(name="many-words", heads=2, kv_heads=1, keys=1200, block_size=(1, 16)),
    Case(name="big-blocks", keys=700, block_size=(1, 128)),
    Case(name="softcap-and-sinks", queries=2, keys=300, softcap=2.0, sinks=True),
    Case(name="paged", batch=3, keys=512, held=(500, 64, 130), page=64),
    Case(name="wide-pages", batch=2, queries=3, keys=768, held=(768, 300), page=256, sinks=True),
    Case(name="llama-8b-32k", heads=32, kv_heads=8, keys=32768, head_dim=128, density=0.1, large=True),
)
