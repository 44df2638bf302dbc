"""What a sparse model really read: density and recall of attention mass, measured as it runs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from seerattention.hosts.transformers import AttentionCall
from seerattention.ops.attention_scores import attention_scores
from seerattention.rows import OneSequence, Rows
from seerattention.selection import BlockSelection


class Watch:
    """An observer for `attach` that adds up density, and recall on a sample of query rows.

    Recall is the share of the true softmax mass (the sum of attention weights) that the selected
    blocks hold, averaged over sampled queries, heads and layers.

    Args:
        rows: Query tokens per layer, sequence and call whose full attention row is computed; 0 for none.
    """

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        # Added up on the devices and read when asked for, so that watching does not wait for them.
        self._read: dict[torch.device, Tensor] = {}
        self._recalled: dict[torch.device, Tensor] = {}
        self.valid = 0
        self.sampled = 0

    @property
    def read(self) -> int:
        """Blocks read so far, of ``valid`` causally valid ones; waits for the devices."""
        return sum(map(int, self._read.values()))

    @property
    def density(self) -> float:
        """Fraction of the causally valid blocks read so far; 1 if nothing ran sparse."""
        return self.read / self.valid if self.valid else 1.0

    @property
    def recall(self) -> float:
        """Share of attention mass read so far; 1 if nothing ran sparse."""
        return sum(map(float, self._recalled.values())) / self.sampled if self.sampled else 1.0

    @torch.inference_mode()
    def __call__(self, layer: int, call: AttentionCall, selection: BlockSelection) -> None:
        """Add one layer's call; the signature of `attach`'s observer."""
        rows = call.rows
        batch, heads = selection.shape[:2]
        _add(self._read, selection.counts.sum(dtype=torch.int64))
        self.valid += sum(
            batch * heads * _num_valid(*lengths, selection.block_size) for lengths in rows.known if lengths[0]
        )
        if self.rows:
            mask, row = selection.to_mask(), 0
            for one in rows.sequences():
                own = slice(row, row + one.rows.num_blocks(selection.block_size)[0])
                self._recall(call, one, mask[:, :, own], selection.block_size)
                row = own.stop

    def _recall(
        self, call: AttentionCall, one: OneSequence, mask: Tensor, block_size: tuple[int, int]
    ) -> None:
        """Add the recall of sampled queries of a sequence, ``mask`` its selection ``[B, H, Nq, Nk]``."""
        q, k, rows = call.q[:, :, one.queries], call.k[:, :, one.keys], one.rows
        query = torch.linspace(0, rows.num_queries - 1, self.rows, device=q.device).long()
        scores = attention_scores(
            q[:, :, query], k, rows.first + query, scale=call.scale, softcap=call.softcap
        )
        # Without sinks: mass that no key can have is no loss.
        share = scores.softmax(-1).unflatten(1, (mask.shape[1], -1))
        blocks = mask[:, :, query // block_size[0]]
        read = blocks.repeat_interleave(block_size[1], -1)[..., : rows.num_keys]
        _add(self._recalled, (share * read.unsqueeze(2)).sum(dtype=torch.float64))
        self.sampled += q.shape[0] * q.shape[1] * self.rows


def _add(sums: dict[torch.device, Tensor], value: Tensor) -> None:
    sums[value.device] = sums[value.device] + value if value.device in sums else value


@lru_cache(maxsize=64)
def _num_valid(num_queries: int, num_keys: int, block_size: tuple[int, int]) -> int:
    return int(Rows.last(num_queries, num_keys).causal(block_size).sum())
