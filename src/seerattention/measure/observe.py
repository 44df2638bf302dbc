"""What a sparse model really read: density and recall of attention mass, measured as it runs."""

from __future__ import annotations

from functools import lru_cache

import torch

from seerattention.hosts.transformers import AttentionCall
from seerattention.selection import BlockSelection, causal_blocks


class Watch:
    """An observer for `attach` that adds up density, and recall on a sample of query rows.

    Recall is the share of the true softmax mass (the sum of attention weights) that the selected
    blocks hold, averaged over sampled queries, heads and layers.

    Args:
        rows: Query tokens per layer and call whose full attention row is computed; 0 for none.
    """

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        # Counted on the devices and read when asked for, so that watching does not wait for them.
        self.counts: list[torch.Tensor] = []
        self.valid = 0
        self.recalled = 0.0
        self.sampled = 0

    @property
    def read(self) -> int:
        """Blocks read so far, of ``valid`` causally valid ones; waits for the devices."""
        return sum(map(int, self.counts))

    @property
    def density(self) -> float:
        """Fraction of the causally valid blocks read so far; 1 if nothing ran sparse."""
        return self.read / self.valid if self.valid else 1.0

    @property
    def recall(self) -> float:
        """Share of attention mass read so far; 1 if nothing ran sparse."""
        return self.recalled / self.sampled if self.sampled else 1.0

    @torch.inference_mode()
    def __call__(self, layer: int, call: AttentionCall, selection: BlockSelection) -> None:
        """Add one layer's call; the signature of `attach`'s observer."""
        batch, heads = selection.shape[:2]
        tokens_q, tokens_k = call.q.shape[2], call.k.shape[2]
        self.counts.append(selection.counts.sum())
        self.valid += batch * heads * _num_valid(tokens_q, tokens_k, selection.block_size)
        if not self.rows:
            return
        query = torch.linspace(0, tokens_q - 1, self.rows, device=call.q.device).long()
        grouped = call.q[:, :, query].unflatten(1, (call.k.shape[1], -1)).float()
        scores = grouped @ call.k.float().mT.unsqueeze(2) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        position = tokens_k - tokens_q + query
        columns = torch.arange(tokens_k, device=query.device)
        scores.masked_fill_(columns > position[:, None], float("-inf"))
        # Without sinks: mass that no key can have is no loss.
        share = torch.softmax(scores.flatten(1, 2), -1)
        blocks = selection.to_mask()[:, :, query // selection.block_size[0]]
        read = blocks.repeat_interleave(selection.block_size[1], -1)[..., :tokens_k]
        self.recalled += float((share * read.repeat_interleave(share.shape[1] // heads, 1)).sum())
        self.sampled += share.shape[0] * share.shape[1] * self.rows


@lru_cache(maxsize=64)
def _num_valid(tokens_q: int, tokens_k: int, block_size: tuple[int, int]) -> int:
    return int(causal_blocks(tokens_q, tokens_k, block_size).sum())
