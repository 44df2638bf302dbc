"""Three small Triton kernels that come one upon the other: query summaries, scores, the rule.

For gates with a score per KV head. The first kernel projects the queries, a part for each query head; the
second adds the parts up, normalises and rotates them, and scores the finished blocks, split over the cache;
in the third a program holds a row and writes its bits. Lengths are read on the device; how many programs
there are follows from shapes alone. Design and floor: docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seerattention.ops.language import (
    padded,
    power_of_two,
    products,
    unsupported_attention,
    unsupported_dtype,
)
from seerattention.ops.launch import Launch, overlapping
from seerattention.ops.select_blocks.triton import KINDS, MAX_BLOCKS
from seerattention.ops.select_decode_blocks._triton_kernel import choose_kernel, query_kernel, score_kernel
from seerattention.policies import Policy, rule_of
from seerattention.rows import num_blocks
from seerattention.selection import WORD, BlockSelection

#: Tiles of the first kernel: tokens and numbers of a summary.
QUERIES = Launch(16, 32, 4, 1)
#: Of the second one: its tokens are those of a step, 16 at least, and so many blocks are scored at a time.
SCORES = Launch(16, 32, 4, 1, 4)
#: Scores of a row that one warp of the third holds.
SCORES_PER_WARP = 256
#: Tokens of a step, at the most.
MOST_TOKENS = 64


def unsupported(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Any,
    policy: Policy,
    lengths: Tensor,
    num_keys: int,
    kv_heads: int,
) -> list[str]:
    """Return the reasons why this backend cannot run."""
    block = scorer.block_size[1]
    blocks = num_blocks(num_keys, block)
    reasons = unsupported_attention(q, k_blocks=k_blocks) + unsupported_dtype(k_blocks.dtype)
    if rule_of(policy, blocks, block) is None or type(policy).always is not Policy.always:
        reasons.append(f"the policy {policy.name} is not its rule alone")
    if blocks > MAX_BLOCKS:
        reasons.append(f"it takes rows of at most {MAX_BLOCKS} blocks, not {blocks}")
    if q.shape[2] > MOST_TOKENS:
        reasons.append(f"it takes at most {MOST_TOKENS} tokens, not {q.shape[2]}")
    if not hasattr(scorer, "summary_options"):
        return [*reasons, f"{type(scorer).__name__} is no gate"]
    options = scorer.summary_options(num_keys, queries=True)
    if options is None:
        return [*reasons, "the gate's rotation depends on the length of the text"]
    if options.weight is None or options.merge != q.shape[1] // kv_heads:
        reasons.append("the gate scores per query head")
    elif options.dtype != k_blocks.dtype or options.weight.shape[2] * options.dtype.itemsize > 512:
        reasons.append(
            f"summaries must be {options.dtype}, as the gate, and of up to 512 bytes, got "
            f"{list(k_blocks.shape)} {k_blocks.dtype}"
        )
    return reasons


def run(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Any,
    policy: Policy,
    lengths: Tensor,
    num_keys: int,
    kv_heads: int,
) -> BlockSelection:
    """Return the selection."""
    options, block = scorer.summary_options(num_keys, queries=True), scorer.block_size[1]
    columns = num_blocks(num_keys, block)
    rule = rule_of(policy, columns, block)
    assert options is not None and options.weight is not None and rule is not None  # noqa: PT018
    batch, heads, tokens, head_dim = q.shape
    group, dim, rows = heads // kv_heads, options.weight.shape[2], batch * tokens
    parts = q.new_empty((rows, kv_heads, group, dim), dtype=torch.float32)
    words = num_blocks(columns, WORD)
    scores = q.new_empty((batch, kv_heads, tokens, words * WORD), dtype=torch.float32)
    bits = torch.empty((batch, kv_heads, tokens, words), dtype=torch.int32, device=q.device)
    cos, sin = options.rotary or (None, None)
    shape = {"KV_HEADS": kv_heads, "GROUP": group, "E": dim, "PRECISION": products(q)}
    chunk, splits = _split(batch * kv_heads, columns, q.device)
    pdl = overlapping(q.device)
    with torch.cuda.device_of(q):
        across = num_blocks(dim, QUERIES.block_n)
        query_kernel[(kv_heads * across, group, num_blocks(rows, QUERIES.block_m))](
            q, options.weight.contiguous(), parts, q.stride()[:3], rows, tokens,
            POOLS=len(options.pools), D=head_dim, BLOCK_D=padded(head_dim), **shape, **QUERIES.tile(), **pdl,
        )  # fmt: skip
        tile = SCORES.tile() | {"BLOCK_M": max(SCORES.block_m, power_of_two(tokens))}
        tile["ROWS"] = 1 if tokens == 1 else tile["BLOCK_M"]
        score_kernel[(batch * kv_heads, splits)](
            parts, k_blocks, scores, lengths, options.norm, cos, sin, k_blocks.stride()[:3],
            tokens, chunk, words * WORD, scorer.scale, options.eps,
            E_PAD=padded(dim), SUBS=scorer.sub_blocks[1], BLOCK_K=block, **shape, **tile, **pdl,
        )  # fmt: skip
        wide = max(WORD, power_of_two(columns))
        choose_kernel[(rows * kv_heads,)](
            scores, bits, lengths, tokens, words * WORD, words, float(rule.value),
            policy.sink_blocks, policy.local_blocks,
            KV_HEADS=kv_heads, BLOCK_K=block, KIND=KINDS.index(rule.kind), WIDTH=wide,
            num_warps=min(16, max(1, wide // SCORES_PER_WARP)), **pdl,
        )  # fmt: skip
    return BlockSelection(bits, (batch, kv_heads, tokens, columns), scorer.block_size)


def _split(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Return how many blocks a program scores, and how many programs share the rows of a KV head."""
    tiles = num_blocks(columns, SCORES.block_n)
    each = num_blocks(tiles, max(1, SCORES.most_programs(device) // rows))
    return each * SCORES.block_n, num_blocks(tiles, each)
