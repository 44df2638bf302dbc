"""The one type that crosses from choosing blocks to computing attention over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def num_blocks(tokens: int, size: int) -> int:
    """Number of blocks of ``size`` tokens that ``tokens`` tokens fill, the last one possibly short."""
    return -(-tokens // size)


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
    last_query, first_key = _block_edges(num_queries, num_keys, block_size, device)
    return first_key[None, :] <= last_query[:, None]


def own_blocks(
    num_queries: int,
    num_keys: int,
    block_size: tuple[int, int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Mark the KV blocks that hold a query block's own tokens: those that are always read.

    One block per row where query and KV blocks are aligned; more where a query block spans several.

    Args:
        num_queries: Query tokens, ``Tq``.
        num_keys: Key tokens, ``Tk >= Tq``.
        block_size: Tokens per (query block, KV block).
        device: Where to build the result.

    Returns:
        bool ``[Nq, Nk]``.
    """
    last_query, first_key = _block_edges(num_queries, num_keys, block_size, device)
    first_query = num_keys - num_queries + block_size[0] * torch.arange(len(last_query), device=device)
    last_key = first_key + block_size[1] - 1
    causal = first_key[None, :] <= last_query[:, None]
    return causal & (last_key[None, :] >= first_query[:, None])


def _block_edges(
    num_queries: int, num_keys: int, block_size: tuple[int, int], device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Position of every query block's last token and of every KV block's first token."""
    if not 1 <= num_queries <= num_keys:
        raise ValueError(f"causal attention needs 1 <= Tq <= Tk, got Tq={num_queries} and Tk={num_keys}")
    block_q, block_k = block_size
    blocks = torch.arange(num_blocks(num_queries, block_q), device=device)
    last_query = ((blocks + 1) * block_q).clamp(max=num_queries) - 1 + num_keys - num_queries
    first_key = torch.arange(num_blocks(num_keys, block_k), device=device) * block_k
    return last_query, first_key


@dataclass(frozen=True)
class BlockSelection:
    """Which KV blocks each query block reads, as compressed sparse rows.

    A row is one (batch, head, query block). ``H`` may be 1, ``Hk`` or ``Hq``; kernels index it with
    ``h // (Hq // H)``. Every row holds at least one block, ascending, none of them acausal; `select`
    makes sure of it. Rows of compressed storage take 4 bytes per selected block whatever the
    distribution over rows (docs/design.md compares it with padded lists and with bits).

    Attributes:
        offsets: int32 ``[B * H * Nq + 1]``; row ``r`` is ``indices[offsets[r]:offsets[r + 1]]``.
        indices: int32 ``[nnz]``, KV block numbers, ascending inside a row.
        shape: ``(B, H, Nq, Nk)``.
        block_size: Tokens per (query block, KV block); ``(1, b)`` is decoding.
    """

    offsets: Tensor
    indices: Tensor
    shape: tuple[int, int, int, int]
    block_size: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: tuple[int, int]) -> BlockSelection:
        """Build a selection from a mask.

        Args:
            mask: bool ``[B, H, Nq, Nk]``.
            block_size: Tokens per (query block, KV block).

        Returns:
            The selection, on the mask's device. On a GPU this waits for the device once, to learn
            how many blocks are selected.

        Raises:
            ValueError: If the mask is not a boolean tensor of four dimensions or a row is empty.
        """
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise ValueError(
                f"a selection is made from a bool mask [B, H, Nq, Nk], got {mask.dtype} {list(mask.shape)}"
            )
        counts = mask.sum(-1, dtype=torch.int32).flatten()
        offsets = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=mask.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
        if bool((counts == 0).any()):
            row = int((counts == 0).nonzero()[0])
            raise ValueError(f"row {row} of the mask selects no block; a query always reads its own block")
        indices = mask.flatten(0, 2).nonzero()[:, 1].to(torch.int32)
        b, h, nq, nk = mask.shape
        return cls(offsets, indices, (b, h, nq, nk), block_size)

    @classmethod
    def full(
        cls,
        num_queries: int,
        num_keys: int,
        block_size: tuple[int, int],
        device: torch.device | str | None = None,
    ) -> BlockSelection:
        """Select every causally valid block: dense attention, ``[1, 1, Nq, Nk]``."""
        mask = causal_blocks(num_queries, num_keys, block_size, device)
        return cls.from_mask(mask[None, None], block_size)

    def to_mask(self) -> Tensor:
        """Return the selection as a bool mask ``[B, H, Nq, Nk]``."""
        b, h, nq, nk = self.shape
        rows = torch.repeat_interleave(
            torch.arange(b * h * nq, device=self.offsets.device),
            self.counts.flatten(),
            output_size=self.indices.numel(),
        )
        mask = torch.zeros(b * h * nq, nk, dtype=torch.bool, device=self.offsets.device)
        mask[rows, self.indices.long()] = True
        return mask.view(b, h, nq, nk)

    @property
    def counts(self) -> Tensor:
        """Selected blocks per row, int32 ``[B, H, Nq]``."""
        return self.offsets.diff().view(self.shape[:3])

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return 4 * (self.offsets.numel() + self.indices.numel())

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
        return self.indices.numel() / (b * h * int(valid.sum()))

    def to_flex(self, num_queries: int, num_keys: int, num_heads: int) -> BlockMask:
        """Return the selection as a ``BlockMask`` for `torch.nn.attention.flex_attention`.

        Args:
            num_queries: Query tokens, ``Tq``.
            num_keys: Key tokens, ``Tk``.
            num_heads: Query heads, ``Hq``; a selection with fewer heads is repeated over them.

        Returns:
            A block mask whose diagonal blocks are causal inside.
        """
        from torch.nn.attention.flex_attention import BlockMask

        mask = self.to_mask().repeat_interleave(num_heads // self.shape[1], dim=1)
        own = own_blocks(num_queries, num_keys, self.block_size, mask.device)
        partial, full = mask & own, mask & ~own

        def lists(m: Tensor) -> tuple[Tensor, Tensor]:
            order = torch.argsort(m.to(torch.int8), dim=-1, descending=True, stable=True)
            return m.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()

        shift = num_keys - num_queries

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q + shift

        return BlockMask.from_kv_blocks(
            *lists(partial),
            *lists(full),
            BLOCK_SIZE=self.block_size,
            mask_mod=causal,
            seq_lengths=(num_queries, num_keys),
            compute_q_blocks=False,
        )
