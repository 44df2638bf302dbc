"""Named calls of `block_sparse_attention`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattention.ops.cases import AttentionCase
from seerattention.ops.options import Options
from seerattention.rows import num_blocks


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """A shape with a selection on it, and what else is asked for.

    Attributes:
        density: Fraction of the earlier blocks that are selected.
        selection_heads: Heads of the selection; default one per query head.
        page: Tokens per page; None where keys lie behind one another.
        shared: How many pages all sequences begin with.
    """

    density: float = 0.3
    selection_heads: int | None = None
    page: int | None = None
    shared: int = 0

    @property
    def held(self) -> tuple[int, ...]:
        """Keys of every sequence."""
        return tuple(keys for _, keys in self.lengths) or (self.keys,) * self.batch

    def pages(self) -> Tensor | None:
        """Return a block table whose pages lie in no order, int32 ``[S, N]``; None without pages.

        Its numbers begin at 1, so that page 0 is nobody's; past a sequence's keys they are of no page.
        """
        if self.page is None:
            return None
        each = num_blocks(max(self.held), self.page) + 1
        order = torch.randperm(len(self.held) * each, generator=torch.Generator().manual_seed(1)) + 1
        pages = order.to(torch.int32).view(-1, each)
        pages[:, : self.shared] = pages[0, : self.shared]
        for row, keys in zip(pages, self.held, strict=True):
            row[num_blocks(keys, self.page) :] = torch.iinfo(torch.int32).max
        return pages

    def options(self, device: str = "cpu", *, return_lse: bool = False) -> Options:
        """Return the options of the case, its tensors on a device."""
        pages = self.pages()
        return Options(**self.asked(device, return_lse), pages=None if pages is None else pages.to(device))


CASES = (
    Case(name="one-token", queries=1),
    Case(name="below-block", queries=63),
    Case(name="one-block", queries=64),
    Case(name="block-plus-one", queries=65),
    Case(name="thousand", queries=1000),
    Case(name="batch", heads=6, queries=200, batch=3),
    Case(name="one-kv-head", kv_heads=1, queries=260, head_dim=80),
    Case(name="no-groups", heads=3, kv_heads=3, queries=200, head_dim=96),
    Case(name="wide-128", queries=190, head_dim=128),
    Case(name="wide-256", heads=2, kv_heads=1, queries=150, head_dim=256),
    Case(name="kv-selection", queries=333, selection_heads=2),
    Case(name="one-selection", queries=333, selection_heads=1),
    Case(name="later-chunk", queries=100, keys=420),
    Case(name="unaligned-chunk", queries=77, keys=301),
    Case(name="last-token", queries=1, keys=500),
    Case(name="wide-rows", queries=300, block_size=(128, 64)),
    Case(name="wide-columns", queries=300, block_size=(32, 128)),
    Case(name="decode-rows", queries=3, keys=600, block_size=(1, 64)),
    Case(name="small-blocks", queries=70, keys=401, block_size=(32, 32), density=0.15),
    Case(name="big-blocks", queries=150, keys=900, head_dim=128, block_size=(128, 128)),
    Case(name="many-words", heads=2, kv_heads=1, queries=70, keys=1200, block_size=(64, 16)),
    Case(name="teacher-8k", heads=6, queries=8192, large=True, density=0.1),
    Case(name="teacher-16k", heads=6, queries=16384, large=True, density=0.1),
    Case(name="llama-8b-32k", heads=32, kv_heads=8, queries=32768, head_dim=128, large=True, density=0.1),
)

#: What not every backend takes.
OPTION_CASES = (
    Case(name="softcap", queries=150, keys=300, softcap=2.0),
    Case(name="sinks", queries=150, keys=300, sinks=True),
    Case(name="softcap-and-sinks", heads=2, queries=90, head_dim=80, softcap=30.0, sinks=True),
    Case(name="packed", queries=284, keys=414, lengths=((130, 130), (1, 1), (0, 0), (63, 193), (90, 90))),
    Case(
        name="packed-with-all",
        queries=164,
        keys=294,
        head_dim=96,
        block_size=(32, 64),
        selection_heads=2,
        lengths=((100, 100), (64, 194)),
        softcap=3.0,
        sinks=True,
    ),
)

#: Keys and values in pages, as `seerattention.testing.paged` lays them out.
PAGED_CASES = (
    Case(name="pages", queries=77, keys=301, batch=2, page=64),
    Case(name="pages-of-a-prompt", heads=2, kv_heads=1, queries=150, page=64),
    Case(name="one-token-in-a-page", queries=1, page=64),
    Case(name="wide-pages", heads=2, kv_heads=1, queries=40, keys=600, page=256, softcap=2.0, sinks=True),
    Case(name="pages-of-big-blocks", heads=2, queries=90, keys=400, block_size=(128, 128), page=128),
    Case(name="small-pages", heads=2, kv_heads=1, queries=40, keys=215, batch=2, page=16),
    Case(
        name="half-pages", heads=3, kv_heads=3, queries=3, keys=330, head_dim=96, block_size=(1, 64), page=32
    ),
    Case(name="odd-pages", queries=70, keys=215, page=48),
    Case(
        name="shared-prefix",
        heads=2,
        kv_heads=1,
        queries=60,
        keys=330,
        batch=3,
        density=0.1,
        page=64,
        shared=4,
    ),
    Case(
        name="packed-pages",
        heads=2,
        kv_heads=1,
        queries=284,
        keys=414,
        lengths=((130, 130), (1, 1), (0, 0), (63, 193), (90, 90)),
        density=0.05,
        page=64,
    ),
    Case(
        name="packed-small-pages",
        queries=70,
        keys=200,
        head_dim=96,
        block_size=(32, 64),
        selection_heads=2,
        lengths=((40, 40), (30, 160)),
        softcap=3.0,
        sinks=True,
        page=32,
    ),
)
