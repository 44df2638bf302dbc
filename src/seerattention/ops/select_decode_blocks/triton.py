"""Two small Triton kernels, one upon the other: query summaries, then scores and the rule.

For gates with a score per KV head. The first kernel projects the queries, a part for each query head; the
second adds the parts up, normalises and rotates them, and scores the finished blocks, split over the cache.
The last of a row's programs holds its scores and writes its bits; rows of several tokens get programs of
their own. Lengths are read on the device; how many programs there are follows from shapes alone. Design and
floor: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import replace
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
from seerattention.ops.rules import KINDS, MAX_BLOCKS, digit_bits
from seerattention.ops.select_decode_blocks._triton_kernel import choose_kernel, query_kernel, score_kernel
from seerattention.policies import Policy, rule_of
from seerattention.rows import num_blocks
from seerattention.selection import WORD, BlockSelection

#: Tiles of the first kernel: tokens and numbers of a summary.
QUERIES = Launch(16, 32, 4, 1)
#: Of the second one: its tokens are those of a step, 16 at least, and so many blocks are scored at a time.
SCORES = Launch(16, 64, 8, 1, 2)
#: The same where blocks have several summaries: so many of 16 numbers at a time, or fewer longer ones.
SUB_SCORES = Launch(16, 512, 8, 1, 4)
#: Products of a tile of those with the tokens of a step, at the most, and numbers that a warp loads at once.
MOST_PRODUCTS, LOADED = 4096, 256
#: Scores of a row that a program of the second kernel holds, at the most.
SCORES_PER_PROGRAM = 2048
#: Scores of a row that one warp holds where a row has a program of its own.
SCORES_PER_WARP = 128
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
    words, wide = num_blocks(columns, WORD), max(WORD, power_of_two(columns))
    parts = q.new_empty((rows, kv_heads, group, dim), dtype=torch.float32)
    scores = q.new_empty((batch, kv_heads, tokens, words * WORD), dtype=torch.float32)
    bits = torch.empty((batch, kv_heads, tokens, words), dtype=torch.int32, device=q.device)
    counters = torch.empty(rows * kv_heads, dtype=torch.int32, device=q.device)
    cos, sin = options.rotary or (None, None)
    padded_tokens, subs = max(SCORES.block_m, power_of_two(tokens)), scorer.sub_blocks[1]
    query_rows = 1 if tokens == 1 else padded_tokens
    launch, held = _tile(subs, padded(dim), query_rows)
    each = launch.block_n // (held["WAYS"] * held["RUN"])
    chunk, splits = _split(batch * kv_heads, columns, each, launch.most_programs(q.device))
    # Programs of one tile are a launch's latency and little else.
    pdl = overlapping(q.device) if chunk == each else {"PDL": False}
    # A row that fits the registers of a scoring program is chosen by the last one.
    together = tokens == 1 and wide <= SCORES_PER_PROGRAM
    warps = launch.warps if together else min(16, max(1, wide // SCORES_PER_WARP))
    few = rows * kv_heads <= SCORES.most_programs(q.device)
    knobs = float(rule.value), policy.sink_blocks, policy.local_blocks
    shape = {"KV_HEADS": kv_heads, **pdl}
    gate = shape | {"GROUP": group, "E": dim, "PRECISION": products(q)}
    shape |= {"BLOCK_K": block, "KIND": KINDS.index(rule.kind), "WIDTH": wide}
    shape |= {"BITS": digit_bits(wide, warps) if few else 1}
    tile = launch.tile() | held | {"BLOCK_M": padded_tokens}
    with torch.cuda.device_of(q):
        across = num_blocks(dim, QUERIES.block_n)
        query_kernel[(kv_heads * across, group, num_blocks(rows, QUERIES.block_m))](
            q, options.weight.contiguous(), parts, counters, q.stride()[:3], rows, tokens,
            POOLS=len(options.pools), D=head_dim, BLOCK_D=padded(head_dim), **gate, **QUERIES.tile(),
        )  # fmt: skip
        score_kernel[(batch * kv_heads, splits)](
            parts, k_blocks, scores, bits, counters, lengths, options.norm, cos, sin, k_blocks.stride()[:3],
            tokens, chunk, words, scorer.scale, options.eps, *knobs,
            E_PAD=padded(dim), SUBS=subs, ROWS=query_rows, TOGETHER=together, **gate | shape, **tile,
        )  # fmt: skip
        if not together:
            choose_kernel[(rows * kv_heads,)](
                scores, bits, lengths, tokens, words, *knobs, num_warps=warps, **shape,
            )  # fmt: skip
    return BlockSelection(bits, (batch, kv_heads, tokens, columns), scorer.block_size)


def _tile(subs: int, dim: int, tokens: int) -> tuple[Launch, dict[str, int]]:
    """Return how summaries are scored, and in how many runs of how many a tile has those of a block."""
    if subs == 1:
        return SCORES, {"WAYS": 1, "RUN": 1}
    width = min(SUB_SCORES.block_n * 16 // dim, MOST_PRODUCTS // tokens)
    held = min(power_of_two(subs), width)
    run = min(held, max(1, LOADED // dim))
    return replace(SUB_SCORES, block_n=width), {"WAYS": held // run, "RUN": run}


def _split(rows: int, columns: int, each: int, programs: int) -> tuple[int, int]:
    """Return how many blocks a program scores, and how many programs share the rows of a KV head.

    Tiles hold ``each`` blocks.
    """
    tiles = num_blocks(columns, each)
    share = num_blocks(tiles, max(1, programs // rows))
    return share * each, num_blocks(tiles, share)
