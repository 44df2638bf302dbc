"""What a call of `pooled_attention` may ask for besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seerattention.ops.block_sparse_attention._options import Options
from seerattention.rows import num_blocks


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PoolOptions(Options):
    """The optional parts of one call, as every backend gets them.

    Attributes:
        per_kv_head: One map per KV head, for gates that choose for a whole group of query heads.
        lengths: (queries, keys) of every packed sequence, read from ``cu_seqlens``; empty if there are
            none.
    """

    per_kv_head: bool = False
    lengths: tuple[tuple[int, int], ...] = ()

    def map_shape(self, q: Tensor, k: Tensor, block_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the shape of the map, ``[B, Hq or Hk, rows, columns]``."""
        lengths = self.lengths or ((q.shape[2], k.shape[2]),)
        rows = sum(num_blocks(queries, block_size[0]) for queries, _ in lengths)
        columns = num_blocks(max(keys for _, keys in lengths), block_size[1])
        return q.shape[0], (k if self.per_kv_head else q).shape[1], rows, columns


def read_lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """Return (queries, keys) of every packed sequence; waits for the device.

    Raises:
        ValueError: If the sequences are not all of q and k, or one has more queries than keys.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, ends, tokens in (("q", ends_q, q.shape[2]), ("k", ends_k, k.shape[2])):
        if ends[0] != 0 or ends[-1] != tokens:
            raise ValueError(
                f"cu_seqlens_{name} must start with 0 and end with the {tokens} tokens of {name}, "
                f"got {ends[0]} to {ends[-1]}"
            )
    lengths = [(ends_q[i + 1] - ends_q[i], ends_k[i + 1] - ends_k[i]) for i in range(len(ends_q) - 1)]
    for i, (queries, keys) in enumerate(lengths):
        if not 0 <= queries <= keys:
            raise ValueError(
                f"sequence {i} has {queries} queries and {keys} keys; it needs 0 <= queries <= keys"
            )
    return lengths
