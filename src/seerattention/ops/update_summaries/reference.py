"""The specification: the block in the making is summarised in every step, and written when it is finished."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.dispatch import runs_everything
from seerattention.scorer import Scorer

unsupported = runs_everything


def run(summaries: Tensor, tail: Tensor, k: Tensor, scorer: Scorer, lengths: Tensor) -> None:
    """Write the tail, and the summaries of blocks that the new keys finish."""
    block, new = scorer.block_size[1], k.shape[2]
    device = k.device
    before = lengths.long()[:, None] - new
    number, rest = before // block, before % block
    place = torch.arange(block, device=device)
    # Each place of the block: a key of the tail, or a new one behind them.
    source = torch.where(place < rest, place, block + (place - rest).clamp(max=new - 1))
    whole = torch.cat((tail, k.to(tail.dtype)), 2)
    whole = whole.gather(2, source[:, None, :, None].expand(*tail.shape))
    made = scorer.compress(whole, positions=number * block + place).to(summaries.dtype)
    entries = number * made.shape[2] + torch.arange(made.shape[2], device=device)
    entries = entries.clamp(max=summaries.shape[2] - 1)[:, None, :, None].expand(*made.shape)
    finishes = (rest + new >= block)[:, :, None, None]
    summaries.scatter_(2, entries, torch.where(finishes, made, summaries.gather(2, entries)))
    places = (before + torch.arange(new, device=device)) % block
    tail.scatter_(2, places[:, None, :, None].expand(*k.shape), k.to(tail.dtype))
