"""The one type that crosses from choosing blocks to computing attention over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.rows import Rows, num_blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: Blocks per word of a selection.
WORD = 32


def causal_blocks(
    num_queries: int,
    num_keys: int,
    block_size: tuple[int, int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Mark the block pairs in which at least one query may see at least one key.

    The queries are the last ``num_queries`` of ``num_keys`` tokens (prefill: all of them). Query
    blocks are counted from the first query given, KV blocks from the first key.

    Args:
        num_queries: Query tokens, ``Tq``.
        num_keys: Key tokens, ``Tk >= Tq``.
        block_size: Tokens per (query block, KV block).
        device: Where to build the result.

    Returns:
        bool ``[Nq, Nk]``.

    Raises:
        ValueError: If there are no queries, or more queries than keys.
    """
    return Rows.last(num_queries, num_keys).causal(block_size, device)


@dataclass(frozen=True)
class BlockSelection:
    """Which KV blocks each query block reads, one bit per pair.

    A row is one (batch, head, query block). ``H`` may be 1, ``Hk`` or ``Hq``; kernels index it with
    ``h // (Hq // H)``. Every row holds at least one block, none of them acausal; `select` makes sure
    of it. Bits have one size whatever was selected, so a GPU fills them without the host learning how
    many blocks there are (docs/design.md compares them with compressed rows and padded lists).

    Attributes:
        bits: int32 ``[B, H, Nq, ceil(Nk / 32)]``; block ``j`` is bit ``j % 32`` of word ``j // 32``,
            bits past ``Nk`` are zero.
        shape: ``(B, H, Nq, Nk)``.
        block_size: Tokens per (query block, KV block); ``(1, b)`` is decoding.
    """

    bits: Tensor
    shape: tuple[int, int, int, int]
    block_size: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: tuple[int, int], *, check: bool = True) -> BlockSelection:
        """Build a selection from a mask.

        Args:
            mask: bool ``[B, H, Nq, Nk]``.
            block_size: Tokens per (query block, KV block).
            check: Look for empty rows, for which a GPU is waited for once.

        Returns:
            The selection, on the mask's device.

        Raises:
            ValueError: If the mask is not a boolean tensor of four dimensions or a row is empty.
        """
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise ValueError(
                f"a selection is made from a bool mask [B, H, Nq, Nk], got {mask.dtype} {list(mask.shape)}"
            )
        b, h, nq, nk = mask.shape
        if check and not bool((some := mask.any(-1)).all()):
            row = int((~some.flatten()).nonzero()[0])
            raise ValueError(f"row {row} of the mask selects no block; a query always reads its own block")
        words = F.pad(mask, (0, -nk % WORD)).unflatten(-1, (-1, WORD))
        places = torch.arange(WORD, dtype=torch.int32, device=mask.device)
        # Distinct bits, so their sum is their union; bit 31 wraps to the sign.
        bits = (words.to(torch.int32) << places).sum(-1, dtype=torch.int32)
        return cls(bits, (b, h, nq, nk), block_size)

    @classmethod
    def full(
        cls,
        rows: Rows,
        block_size: tuple[int, int],
        device: torch.device | str | None = None,
    ) -> BlockSelection:
        """Select every causally valid block: dense attention, ``[1, 1, Nq, Nk]``."""
        return cls.from_mask(rows.causal(block_size, device)[None, None], block_size, check=False)

    def to_mask(self) -> Tensor:
        """Return the selection as a bool mask ``[B, H, Nq, Nk]``."""
        places = torch.arange(WORD, dtype=torch.int32, device=self.bits.device)
        mask = (self.bits[..., None] >> places) & 1
        return mask.to(torch.bool).flatten(-2)[..., : self.shape[3]]

    @property
    def counts(self) -> Tensor:
        """Selected blocks per row, int32 ``[B, H, Nq]``."""
        # Sums of neighbouring bits, then pairs, then nibbles (Warren, Hacker's Delight, section 5-1).
        x = self.bits
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        return ((x + (x >> 16)) & 0x3F).sum(-1, dtype=torch.int32)

    def row_slice(self, start: int, end: int) -> BlockSelection:
        """Return the selection of query blocks ``start`` to ``end``, sharing storage."""
        b, h, _, nk = self.shape
        return BlockSelection(self.bits[:, :, start:end], (b, h, end - start, nk), self.block_size)

    def to(self, device: torch.device) -> BlockSelection:
        """Return the selection on a device; itself where it is there."""
        moved = self.bits.to(device)
        return self if moved is self.bits else BlockSelection(moved, self.shape, self.block_size)

    def check(self, rows: Rows) -> None:
        """Check what kernels rely on and never look at, for debugging; this waits for a GPU.

        Args:
            rows: The queries and keys it is to be used with.

        Raises:
            ValueError: If the number of blocks does not fit, a bit is set past ``Nk``, a row selects
                no block, or a block lies wholly after its queries.
        """
        b, h, nq, nk = self.shape
        valid = rows.causal(self.block_size, self.bits.device)
        if tuple(valid.shape) != (nq, nk) or tuple(self.bits.shape) != (b, h, nq, num_blocks(nk, WORD)):
            raise ValueError(
                f"a selection of shape {self.shape} holds bits {list(self.bits.shape)}, but "
                f"{rows.num_queries} queries and {rows.num_keys} keys make {list(valid.shape)} blocks"
            )
        mask = BlockSelection(self.bits, (b, h, nq, self.bits.shape[3] * WORD), self.block_size).to_mask()
        past, mask = mask[..., nk:], mask[..., :nk]
        for wrong, what in (
            (past.any(-1), f"has bits set past its {nk} blocks"),
            (~mask.any(-1), "selects no block"),
            ((mask & ~valid).any(-1), "selects a block that lies after its queries"),
        ):
            if wrong.any():
                raise ValueError(f"row {wrong.nonzero()[0].tolist()} (batch, head, query block) {what}")

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the selection as compressed rows; on a GPU this waits for the device.

        Returns:
            ``offsets``, int64 ``[B * H * Nq + 1]``, and ``indices``, int32 ``[nnz]``: row ``r`` reads
            the blocks ``indices[offsets[r]:offsets[r + 1]]``, ascending.
        """
        offsets = F.pad(self.counts.flatten().cumsum(0), (1, 0))
        return offsets, self.to_mask().flatten(0, 2).nonzero()[:, 1].to(torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return 4 * self.bits.numel()

    def density(self, valid: Tensor) -> float:
        """Fraction of the causally valid blocks that are read.

        Args:
            valid: bool ``[Nq, Nk]`` from `causal_blocks`.

        Returns:
            A number in (0, 1], over all batch entries and heads.
        """
        b, h, nq, nk = self.shape
        if tuple(valid.shape) != (nq, nk):
            raise ValueError(f"valid must be [{nq}, {nk}], got {list(valid.shape)}")
        return int(self.counts.sum()) / (b * h * int(valid.sum()))

    def to_flex(self, rows: Rows, num_heads: int) -> BlockMask:
        """Return the selection as a ``BlockMask`` for `torch.nn.attention.flex_attention`.

        Args:
            rows: Where its queries lie among its keys; not of packed sequences.
            num_heads: Query heads, ``Hq``; a selection with fewer heads is repeated over them.

        Returns:
            A block mask whose diagonal blocks are causal inside, for a compiled ``flex_attention``:
            uncompiled, that asks no mask for its blocks, and computes dense causal attention.
        """
        from torch.nn.attention.flex_attention import BlockMask

        mask = self.to_mask().repeat_interleave(num_heads // self.shape[1], dim=1)
        own = rows.own(self.block_size, mask.device)
        partial, full = mask & own, mask & ~own

        def lists(m: Tensor) -> tuple[Tensor, Tensor]:
            order = torch.argsort(m.to(torch.int8), dim=-1, descending=True, stable=True)
            return m.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()

        shift = rows.first

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q + shift

        return BlockMask.from_kv_blocks(
            *lists(partial),
            *lists(full),
            BLOCK_SIZE=self.block_size,
            mask_mod=causal,
            seq_lengths=(rows.num_queries, rows.num_keys),
            compute_q_blocks=False,
        )
