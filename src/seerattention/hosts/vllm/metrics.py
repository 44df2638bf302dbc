"""What is read, counted beside vLLM's own metrics, which its server shows where processes share a folder."""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import torch
from prometheus_client import Counter
from torch import Tensor

from seerattention.engine.call import AttentionCall
from seerattention.selection import BlockSelection, causal_blocks

TOKENS = Counter(
    "seerattention_prompt_tokens",
    "Tokens of prompts, by whether their attention was sparse.",
    ["layer", "attention"],
)
READ = Counter("seerattention_blocks_read", "Blocks that sparse attention read, of all heads.", ["layer"])
CAUSAL = Counter(
    "seerattention_blocks_causal", "Blocks that dense attention would have read in their place.", ["layer"]
)

#: Counts of blocks that a GPU has yet to tell, in the order in which it does: the counter's child, the number
#: on its way here, and what says that it is here.
_COMING: deque[tuple[Any, Tensor, torch.cuda.Event]] = deque()


@functools.lru_cache(maxsize=16)
def _causal(queries: int, keys: int, block_size: tuple[int, int]) -> int:
    """Count the blocks that dense attention reads for a piece of a prompt, alike in all layers."""
    return int(causal_blocks(queries, keys, block_size).sum())


def count_tokens(layer: int, attention: str, tokens: int) -> None:
    """Count tokens of prompts.

    Args:
        layer: Layer index.
        attention: ``sparse`` or ``dense``.
        tokens: How many.
    """
    TOKENS.labels(str(layer), attention).inc(tokens)


def count_blocks(layer: int, call: AttentionCall, selection: BlockSelection) -> None:
    """Count what a layer read of a prompt; an observer of sparse layers.

    A GPU is not waited for: what it has not told yet is counted with a later call.
    """
    heads = selection.shape[0] * selection.shape[1]
    causal = _causal(call.rows.num_queries, call.rows.num_keys, selection.block_size)
    told, read = READ.labels(str(layer)), selection.counts.sum(dtype=torch.int64)
    if read.is_cuda:
        _COMING.append((told, read.to("cpu", non_blocking=True), torch.cuda.Event()))
        _COMING[-1][2].record()
    else:
        told.inc(int(read))
    while _COMING and _COMING[0][2].query():
        counter, number, _ = _COMING.popleft()
        counter.inc(int(number))
    CAUSAL.labels(str(layer)).inc(heads * causal)
