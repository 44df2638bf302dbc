"""The scores of a chunk of rows, by the kernel that a GPU has for them."""

from __future__ import annotations

import contextlib
import importlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.language import padded, products
from seerattention.ops.launch import Launch, width
from seerattention.ops.select_blocks.kernels.triton import narrow, score
from seerattention.rows import num_blocks
from seerattention.scorer import Scorer, rounded
from seerattention.selection import WORD

hopper_kernel: Any = None
with contextlib.suppress(ImportError):
    hopper_kernel = importlib.import_module("seerattention.ops.select_blocks.kernels.hopper")

#: Launches of Triton's kernel, by what `width` says; ``block_n`` are the summaries of keys in a product.
LAUNCHES = {
    "narrow": Launch(64, 256, 4, 2),
    "wide": Launch(64, 64, 8, 1),
    "narrow shares": Launch(64, 256, 4, 1, registers=168),
    "wide shares": Launch(64, 64, 8, 1),
}

#: Bytes of key summaries that a program of it holds, and the tiles of rows that pass by: at most so many, as
#: long as there are so many programs.
HELD_BYTES, STRIP, PROGRAMS = 64 * 2**10, 16, 1024

#: KV blocks of a tile of the Hopper kernel, its summaries' numbers, and how many summaries a block may have.
HOPPER_BLOCKS, HOPPER_DIM, HOPPER_SUBS = 32, 64, (4, 8, 12, 16, 32)

#: It keeps scores as int16, differences from the largest of a tile: so many steps are a factor of 2.
HOPPER_STEPS = 512

#: How far the logarithm of a share of them may be off: half a step for the score, for its tile's largest and
#: for the score in the row's own block, which adds to the total.
HOPPER_ROUNDING = 1.5 * math.log(2) / HOPPER_STEPS

#: How far its sums of products of 8 bits may be off, as a part of the sum of their sizes: it adds up 32 at a
#: time in fp16, which may cut off.
HOPPER_ADDING = 2 * 2.0**-10

#: Numbers that a program rounds to fewer bits.
NARROWED = 4096

#: Rows in a tile of it; tiles that pass by a consumer at most, and items that every multiprocessor gets
#: before they do.
HOPPER_ROWS, HOPPER_STRIP, HOPPER_ITEMS = 64, 8, 8

#: Its consumers, by the bytes of a number.
HOPPER_CONSUMERS = {1: 3, 2: 2}


@dataclass(frozen=True)
class Scores:
    """What is scored: summaries of queries and keys, and where they lie.

    A row of scores is one query block; where shares are compared, one query summary.

    Attributes:
        queries: ``[B, H, rows, E]``, contiguous, from the first row on.
        keys: ``[B, H or a divisor, Nk * subs, E]``, contiguous; a last block may have fewer.
        sequences: Of packed sequences, what `triton` says.
        subs: Summaries per row of scores and per KV block.
        block_size: Tokens per row of scores and per KV block.
        shares: Whether shares are compared: rows need totals.
        past: Position of the first query.
        scale: Factor of the scores.
        hopper: Whether the Hopper kernel scores.
    """

    queries: Tensor
    keys: Tensor
    sequences: Tensor | None
    subs: tuple[int, int]
    block_size: tuple[int, int]
    shares: bool
    past: int
    scale: float
    hopper: bool

    @property
    def heads(self) -> int:
        """Rows of scores are of so many heads of all sequences."""
        batch = self.queries.shape[0] if self.sequences is None else len(self.sequences)
        return batch * self.queries.shape[1]

    @property
    def group(self) -> int:
        """Query heads per head of keys."""
        return self.queries.shape[1] // self.keys.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Scores are kept in it."""
        return torch.int16 if self.hopper else torch.float32

    @property
    def steps(self) -> int:
        """How many are a factor of 2; 0 of floats."""
        return HOPPER_STEPS if self.hopper else 0

    @cached_property
    def tile(self) -> dict[str, int]:
        """Tiles of Triton's kernel."""
        launch = LAUNCHES[width(self.keys) + (" shares" if self.shares else "")]
        return _tile(launch, self.keys.shape[3], self.keys.element_size(), products(self.keys), *self.subs)

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return HOPPER_ROWS if self.hopper else self.tile["BLOCK_M"]

    @property
    def blocks(self) -> int:
        """KV blocks of a tile."""
        return HOPPER_BLOCKS if self.hopper else self.tile["BLOCK_N"]

    def fill(self, scores: Tensor, totals: Tensor | None, start: int, stop: int, seen: int) -> None:
        """Write the scores of rows ``start`` to ``stop``.

        Args:
            scores: ``[heads, stop - start, stride(seen)]``, or longer, of `dtype`.
            totals: Where shares are compared fp32 ``[heads, tiles of blocks, 2, stop - start]``, or longer:
                largest score and sum of exponentials of differences from it, before a row's own block.
            start: The first row.
            stop: The row after the last one.
            seen: KV blocks that any of these rows sees.
        """
        (self._fill_on_hopper if self.hopper else self._fill)(scores, totals, start, stop, seen)

    def _fill(self, scores: Tensor, totals: Tensor | None, start: int, stop: int, seen: int) -> None:
        across = num_blocks(seen, self.blocks)
        strip = _strip(self.tile, stop - start, self.heads * across)
        score[self.heads, num_blocks(stop - start, strip) * across](
            self.queries,
            self.keys,
            scores,
            totals,
            self.sequences,
            self.queries.shape[2],
            self.keys.shape[2],
            start,
            stop,
            seen,
            stride(seen),
            self.past,
            self.scale,
            HEADS=self.queries.shape[1],
            GROUP=self.group,
            E=self.keys.shape[3],
            SUBS_Q=self.subs[0],
            SUBS_K=self.subs[1],
            BLOCK_Q=self.block_size[0],
            BLOCK_K=self.block_size[1],
            EXACT=self.shares,
            PRECISION=products(self.keys),
            **self.tile | {"strip": strip},
        )

    def _fill_on_hopper(
        self, scores: Tensor, totals: Tensor | None, start: int, stop: int, seen: int
    ) -> None:
        across = num_blocks(seen, self.blocks)
        processors = torch.cuda.get_device_properties(self.queries.device).multi_processor_count
        tiles = num_blocks(stop - start, HOPPER_ROWS) * across * self.heads
        tile = hopper_tile(self.subs[1], self.queries.element_size())
        # As many tiles for each of the consumers.
        strip = HOPPER_STRIP * tile["CONSUMERS"]
        while strip > tile["CONSUMERS"] and tiles < HOPPER_ITEMS * processors * strip:
            strip //= 2
        hopper_kernel.score[(processors,)](
            *self._described,
            scores,
            totals,
            self.heads,
            self.group,
            start,
            stop,
            self.past,
            across,
            strip * HOPPER_ROWS,
            stride(seen),
            self.scale,
            SUBS=self.subs[1],
            BLOCK_Q=self.block_size[0],
            BLOCK_K=self.block_size[1],
            STEPS=self.steps,
            num_warps=4,
            **tile,
        )

    @cached_property
    def _described(self) -> tuple[Any, Any]:
        """Queries and keys as the Hopper kernel reads them: whole quarters of tiles of blocks."""
        keys, quarter = self.keys, HOPPER_BLOCKS // 4 * self.subs[1]
        if keys.shape[2] % quarter:
            # A short last block repeats its last summary, which no maximum notices.
            whole = num_blocks(keys.shape[2], quarter) * quarter
            keys = keys.new_empty(*keys.shape[:2], whole, keys.shape[3])
            keys[:, :, : self.keys.shape[2]] = self.keys
            keys[:, :, self.keys.shape[2] :] = self.keys[:, :, -1:]
        return hopper_kernel.describe_queries(self.queries), hopper_kernel.describe_keys(keys, self.subs[1])


def multiplied(summaries: Tensor, scorer: Scorer, hopper: bool) -> Tensor:
    """Return contiguous summaries as they are multiplied: on Hopper in the scorer's own dtype of scores."""
    dtype: torch.dtype | None = getattr(scorer, "score_dtype", None)
    if dtype is None or not hopper:
        return rounded(summaries, scorer).contiguous()
    if summaries.dtype == dtype:
        return summaries.contiguous()
    if torch.compiler.is_compiling():
        return rounded(summaries, scorer).to(dtype).contiguous()
    summaries = summaries.contiguous()
    out = torch.empty_like(summaries, dtype=dtype)
    with torch.cuda.device_of(out):
        narrow[(num_blocks(out.numel(), NARROWED),)](
            summaries, out, out.numel(), torch.finfo(dtype).max, BLOCK=NARROWED, num_warps=4
        )
    return out


def hopper_tile(subs: int, nbytes: int) -> dict[str, int]:
    """Return the Hopper kernel's tiles for summaries of so many bytes a number, ``subs`` in a KV block."""
    # A tile of blocks with 32 summaries of 16 bits is 128 KiB: there is no room for a second one.
    stages = 1 if HOPPER_BLOCKS * subs * HOPPER_DIM * nbytes > 64 * 2**10 else 2
    return {"CONSUMERS": HOPPER_CONSUMERS[nbytes], "KEY_STAGES": stages}


def stride(seen: int) -> int:
    """Distance between rows of scores: rows begin at the edge of a cache line."""
    return num_blocks(seen, WORD) * WORD


def _tile(launch: Launch, dim: int, nbytes: int, precision: str, subs_q: int, subs_k: int) -> dict[str, int]:
    """Return the score kernel's tiles: as many blocks as can be held with all of their summaries.

    At least 16; of blocks with more summaries than fit a part is held at a time.

    Args:
        launch: Of the kernel.
        dim: Numbers of a summary.
        nbytes: Bytes of a number.
        precision: How fp32 is multiplied.
        subs_q: Summaries of queries per row of scores.
        subs_k: Summaries of keys per block.
    """
    widths = _widths(dim, precision if nbytes == 4 else "ieee")
    # Three products of fp32 hold it twice; and tiles of wide queries need room.
    fit = HELD_BYTES // (sum(widths.values()) * nbytes * (2 if nbytes == 4 or dim > 128 else 1))
    # In one product if possible: with more blocks than that, what passes from one to the next spills.
    most = min(launch.block_n // 2, max(32, launch.block_n // subs_k))
    blocks = _power(max(16, min(most, fit // subs_k)))
    # Nor is there any for a second tile of such queries, where each is scored at once.
    stages = 1 if dim > 96 and subs_q == 1 else launch.stages
    held = max(n for n in range(1, subs_k + 1) if subs_k % n == 0 and (n == 1 or n * blocks <= fit))
    return {
        **replace(launch, stages=stages, registers=launch.registers if blocks <= 32 else None).tile(),
        **widths,
        "BLOCK_N": blocks,
        "HELD": held,
        "JOINED": math.gcd(held, max(1, launch.block_n // blocks)),
        "NEAR": _power(min(128, max(16, fit // 4))),
        "strip": launch.block_m * max(1, STRIP // subs_q),
    }


def _strip(tile: dict[str, int], rows: int, others: int) -> int:
    """Return how many rows pass by in a program of which there are ``others`` for each strip of ``rows``."""
    strip = tile["strip"]
    while strip > tile["BLOCK_M"] and num_blocks(rows, strip) * others < PROGRAMS:
        strip //= 2
    return strip


def _power(n: int) -> int:
    """Return the largest power of two that is not larger than ``n``."""
    return 1 << (n.bit_length() - 1)


def _widths(dim: int, precision: str) -> dict[str, int]:
    """Cover the summaries' values by one tile that is a power of two wide, or by two where that is less.

    Not where three products make one of fp32: added to what is there already they lose digits.
    """
    whole = padded(dim)
    low = whole // 2
    rest = padded(dim - low)
    if precision == "tf32x3" or low < 16 or low + rest == whole:
        return {"E_LOW": whole, "E_REST": 0}
    return {"E_LOW": low, "E_REST": rest}
