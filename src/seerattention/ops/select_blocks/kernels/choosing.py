"""Scores and policy in Triton: a buffer of block scores that stays in the cache, no sort, no mask.

Rows of query blocks are taken in chunks, the latest and longest first. One kernel fills the chunk's block
scores: the product of every pair of sub-blocks, its maximum taken in registers. A second one holds a row
at a time, finds where the policy's rule ends by bisection on the bits of its floats, and packs what is
taken. Where shares are compared, the first one fills a row for every query summary, of which the second makes
one by softmax and maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.language import power_of_two
from seerattention.ops.rules import KINDS, MAX_BLOCKS
from seerattention.ops.score_blocks import check_pair
from seerattention.ops.select_blocks.kernels.scores import Scores, multiplied, stride
from seerattention.ops.select_blocks.kernels.triton import choose
from seerattention.policies import Policy, Rule, rule_of
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer, compares_shares
from seerattention.selection import WORD, BlockSelection

#: Scores of a row that one warp of the policy kernel holds.
SCORES_PER_WARP = 512

#: Query summaries whose scores it loads together.
TOGETHER = 4

#: Bytes of block scores of a chunk of rows, to be read back from a GPU's L2 cache.
SCORE_BYTES = 32 * 2**20

#: The same of shares, a row for every query summary: fewer and longer chunks are faster than what is cached.
SHARE_BYTES = 512 * 2**20

#: Bytes of query summaries made at a time.
SUMMARY_BYTES = 32 * 2**20


def why_not(k_blocks: Tensor, scorer: Scorer, policy: Policy, rows: Rows) -> list[str]:
    """Return the reasons why no kernel takes the scorer, the policy or the rows, on whatever device."""
    reasons = []
    if getattr(scorer, "sub_blocks", None) is None:
        reasons.append(f"{type(scorer).__name__} does not say that its scores are products (sub_blocks)")
    if rows.is_packed and rows.lengths is None:
        return [*reasons, "the host does not know the lengths of the packed sequences"]
    blocks = rows.num_blocks(scorer.block_size)[1]
    if rule_of(policy, blocks, scorer.block_size[1]) is None:
        reasons.append(f"the policy {policy.name} gives no rule")
    if type(policy).always is not Policy.always:
        reasons.append(f"the policy {policy.name} always reads blocks of its own")
    if blocks > MAX_BLOCKS:
        reasons.append(f"it takes rows of at most {MAX_BLOCKS} blocks, not {blocks}")
    if k_blocks.shape[-1] * k_blocks.element_size() > 512:
        reasons.append("it takes summaries of up to 512 bytes")
    return reasons


@torch.no_grad()
def run(
    q: Tensor,
    k_blocks: Tensor,
    scorer: Any,
    policy: Policy,
    rows: Rows,
    *,
    positions: Tensor,
    hopper: bool,
) -> BlockSelection:
    """Return the selection; with ``hopper`` from scores by the Hopper kernel."""
    block_q, block_k = scorer.block_size
    down, columns = rows.num_blocks(scorer.block_size)
    packed = rows if rows.is_packed else None
    lengths = [(one.rows.num_queries, one.rows.num_keys) for one in rows.sequences()]
    asked = (rule_of(policy, num_blocks(num_keys, block_k), block_k) for _, num_keys in lengths)
    rules = [rule for rule in asked if rule is not None]
    start = choose_op if torch.compiler.is_compiling() else choose_rows
    keys = multiplied(k_blocks, scorer, hopper)
    sequences = None if packed is None else _sequences(packed, scorer, q.device)
    # Those of queries are rounded as they are made: there are many, and they are used once.
    dtype = getattr(scorer, "score_dtype", None) if hopper else None
    few_bits = {} if dtype is None else {"rounded_to": dtype}
    bits = values = None
    per_row = q.shape[0] * q.shape[1] * scorer.sub_blocks[0] * keys.shape[3] * keys.element_size()
    step = max(1, SUMMARY_BYTES // per_row) if packed is None else down
    for first in range(0, down, step):
        part = slice(first * block_q, min(rows.num_queries, (first + step) * block_q))
        queries = scorer.summarise_queries(
            q[:, :, part], positions=positions[..., part], rows=packed, **few_bits
        )
        if bits is None:
            check_pair(queries, keys)
            heads = queries.shape[1]
            values = _values(rules, heads, packed is not None, q.device)
            shape = (q.shape[0], heads, down, num_blocks(columns, WORD))
            bits = torch.zeros(shape, dtype=torch.int32, device=q.device)
        start(
            multiplied(queries, scorer, hopper),
            keys,
            bits,
            first,
            [block_q, block_k],
            list(chain.from_iterable(lengths)),
            sequences,
            list(scorer.sub_blocks),
            compares_shares(scorer),
            scorer.scale,
            KINDS.index(rules[0].kind),
            float(rules[0].value),
            values,
            rules[0].row_exponent,
            [policy.sink_blocks, policy.local_blocks, policy.dense_last_rows],
            hopper,
        )
        # The next part's summaries may take the memory of these.
        del queries
    assert bits is not None
    return BlockSelection(bits, (q.shape[0], bits.shape[1], down, columns), scorer.block_size)


def choose_rows(
    queries: Tensor,
    keys: Tensor,
    bits: Tensor,
    first: int,
    block_size: list[int],
    lengths: list[int],
    sequences: Tensor | None,
    subs: list[int],
    shares: bool,
    scale: float,
    kind: int,
    value: float,
    values: Tensor | None,
    row_exponent: float,
    knobs: list[int],
    hopper: bool,
) -> None:
    """Write the bits of the rows whose summaries are given.

    Args:
        queries: Summaries of the query blocks from row ``first`` on, ``[B, H, rows * subs[0], E]``; of all
            rows of packed sequences.
        keys: Summaries of all keys, ``[B, H or a divisor, Nk * subs[1], E]``; of packed sequences
            ``[S, H or a divisor, longest, E]``.
        bits: Of the whole selection, zeros.
        first: Row of the first query block given.
        block_size: Tokens per (query block, KV block).
        lengths: Queries and keys of the sequence, or one after the other of every packed one with queries.
        sequences: Of packed sequences, what `_sequences` returns.
        subs: Summaries per query block and KV block.
        shares: Whether shares are compared, see `score_blocks`.
        scale: Factor of the scores.
        kind: Of the rule, its place in ``KINDS``.
        value: Of the rule, where it is one for all heads and sequences.
        values: fp32 ``[H]``, the rule's value for each head, else; of packed sequences ``[S, H]``.
        row_exponent: Of the rule.
        knobs: Sink blocks, local blocks, dense last rows.
        hopper: Whether the Hopper kernel scores.
    """
    heads, (block_q, block_k) = queries.shape[1], block_size
    tokens, past = lengths[0], lengths[1] - lengths[0]
    down = num_blocks(queries.shape[2], subs[0])
    if sequences is not None:
        down = max(num_blocks(n, block_q) for n in lengths[::2])
    # Rows of scores for each row of blocks.
    each = subs[0] if shares else 1
    scored = Scores(
        queries,
        keys,
        sequences,
        (subs[0] // each, subs[1]),
        (block_q // each, block_k),
        shares,
        first * block_q + past,
        scale,
        hopper,
    )
    widths = _seen(lengths, first, down, block_size)
    most = (SHARE_BYTES if shares else SCORE_BYTES) // (scored.dtype.itemsize * scored.heads * each)
    chunks = list(_chunks(widths, most, max(1, scored.rows // each)))
    space = max((stop - start) * each * stride(widths[stop - 1]) for start, stop in chunks)
    scores = torch.empty(scored.heads * space, dtype=scored.dtype, device=queries.device)
    across = [num_blocks(seen, scored.blocks) for seen in widths]
    totals = None
    if shares:
        space = max((stop - start) * each * across[stop - 1] for start, stop in chunks)
        totals = torch.empty(2 * scored.heads * space, dtype=torch.float32, device=queries.device)
    with torch.cuda.device_of(queries):
        for start, stop in chunks:
            seen = widths[stop - 1]
            scored.fill(scores, totals, start * each, stop * each, seen)
            wide = max(WORD, power_of_two(seen))
            choose[scored.heads, stop - start](
                scores,
                totals,
                bits,
                sequences,
                first + start,
                stop - start,
                stride(seen),
                across[stop - 1],
                bits.shape[2],
                bits.shape[3],
                tokens,
                past,
                value,
                values,
                row_exponent,
                knobs[0],
                knobs[1],
                bits.shape[2] - knobs[2],
                BLOCK_Q=block_q,
                BLOCK_K=block_k,
                HEADS=heads,
                EACH=each if shares else 0,
                TOGETHER=math.gcd(each, TOGETHER),
                KIND=kind,
                SLOPED=row_exponent != 0,
                WIDTH=wide,
                TILE=scored.blocks,
                SUBS=power_of_two(each),
                WITHIN=sequences is None and past % block_k == 0 and block_k % block_q == 0,
                STEPS=scored.steps,
                num_warps=min(16, max(1, wide // SCORES_PER_WARP)),
            )


def _seen(lengths: list[int], first: int, down: int, block_size: list[int]) -> list[int]:
    """Return how many KV blocks any sequence sees in each of ``down`` rows from row ``first`` on."""
    widths = [0] * down
    for queries, keys in zip(lengths[::2], lengths[1::2], strict=True):
        for row in range(first, min(first + down, num_blocks(queries, block_size[0]))):
            seen = min((row + 1) * block_size[0] - queries, 0) + keys
            widths[row - first] = max(widths[row - first], num_blocks(seen, block_size[1]))
    # A packed sequence may see more in an earlier row than the ones that have later rows.
    return list(accumulate(widths, max))


def _sequences(rows: Rows, scorer: Any, device: torch.device) -> Tensor:
    """Where each packed sequence that has queries lies, int32 ``[S, 7]``, as `score` and `choose` read it.

    Its place among the rectangle's rows, its first summary of queries and how many there are, its summaries
    of keys, its query tokens and those before them, and its first row.
    """
    size_q = scorer.block_size[0] // scorer.sub_blocks[0]

    def make() -> Tensor:
        summaries = rows.places(rows.num_queries, size_q)
        return torch.tensor(
            [
                (
                    one.index,
                    summaries[one.index].start,
                    num_blocks(one.rows.num_queries, size_q),
                    num_blocks(one.rows.num_keys, scorer.tokens_per_summary),
                    one.rows.num_queries,
                    one.rows.first,
                    down.start,
                )
                for one, (down, _) in rows.maps(scorer.block_size)
            ],
            dtype=torch.int32,
        )

    return rows.kept(("sequences", scorer.block_size, size_q, scorer.tokens_per_summary), device, make)


def _values(rules: list[Rule], heads: int, packed: bool, device: torch.device) -> Tensor | None:
    """Return the rule's value for each head, of packed sequences for each head of each; None if it is one."""
    if not packed and not rules[0].per_head:
        return None
    rules[0].check_heads(heads)
    values = (rule.per_head or (rule.value,) * heads for rule in rules)
    return _on_device(tuple(chain.from_iterable(values)), device)


@lru_cache(maxsize=4096)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Keep a layer's limits on the device; the host does not wait for the copy."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def _chunks(widths: list[int], scores: int, tile: int) -> Iterator[tuple[int, int]]:
    """Rows ``start <= row < stop`` whose scores are at most ``scores`` per head, the last rows first."""
    stop = len(widths)
    while stop:
        rows = max(1, scores // stride(widths[stop - 1]))
        # Whole tiles, as long as there is room for one.
        rows = rows // tile * tile or rows
        start = max(0, stop - rows)
        yield start, stop
        stop = start


choose_op = torch.library.custom_op("seerattention::choose_rows", choose_rows, mutates_args=("bits",))
choose_op.register_fake(lambda *_: None)
