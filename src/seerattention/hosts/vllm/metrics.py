"""What is read, counted beside vLLM's own metrics, which its server shows where processes share a folder."""

# pyright: reportMissingImports=false

from __future__ import annotations

import torch
from prometheus_client import Counter

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


def count_tokens(layer: int, attention: str, tokens: int) -> None:
    """Count tokens of prompts.

    Args:
        layer: Layer index.
        attention: ``sparse`` or ``dense``.
        tokens: How many.
    """
    TOKENS.labels(str(layer), attention).inc(tokens)


def count_blocks(layer: int, call: AttentionCall, selection: BlockSelection) -> None:
    """Count what a layer read of a prompt; an observer of sparse layers."""
    heads = selection.shape[0] * selection.shape[1]
    valid = causal_blocks(call.rows.num_queries, call.rows.num_keys, selection.block_size)
    READ.labels(str(layer)).inc(int(selection.counts.sum(dtype=torch.int64)))
    CAUSAL.labels(str(layer)).inc(heads * int(valid.sum()))
