"""Scores and policy in Triton: a buffer of block scores that stays in the cache, no sort, no mask.

Rows of query blocks are taken in chunks, the latest and longest first. One kernel fills the chunk's block
scores: the product of every pair of sub-blocks, its maximum taken in registers. A second one holds a row
at a time, finds where the policy's rule ends by bisection on the bits of its floats, and packs what is
taken. Where shares are compared, the first one fills a row for every query summary, of which the second makes
one by softmax and maximum.
"""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.language import (
    best_products,
    jit,
    padded,
    power_of_two,
    products,
    tl,
    unsupported_dtype,
    unsupported_here,
)
from seerattention.ops.launch import Launch, width
from seerattention.ops.rules import KINDS, MAX_BLOCKS, store_bits, take
from seerattention.policies import Policy, Rule, rule_of
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer, compares_shares
from seerattention.selection import WORD, BlockSelection

#: Launches of the score kernel, by what `width` says; either takes less than 100 KB of shared memory.
LAUNCHES = {
    "narrow": Launch(64, 64, 4, 2, resident=4),
    "wide": Launch(64, 32, 8, 1),
    "narrow shares": Launch(64, 64, 4, 3),
    "wide shares": Launch(64, 32, 8, 1),
}

#: Scores of a row that one warp of the policy kernel holds.
SCORES_PER_WARP = 512

#: Bytes of block scores of a chunk of rows, to be read back from a GPU's L2 cache.
SCORE_BYTES = 32 * 2**20

#: The same of shares, a row for every query summary: fewer and longer chunks are faster than what is cached.
SHARE_BYTES = 128 * 2**20

#: Bytes of query summaries made at a time.
SUMMARY_BYTES = 32 * 2**20


def unsupported(q: Tensor, k_blocks: Tensor, scorer: Scorer, policy: Policy, rows: Rows) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_here(q) + unsupported_dtype(k_blocks.dtype)
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
    q: Tensor, k_blocks: Tensor, scorer: Any, policy: Policy, rows: Rows, *, positions: Tensor
) -> BlockSelection:
    """Return the selection."""
    block_q, block_k = scorer.block_size
    down, columns = rows.num_blocks(scorer.block_size)
    packed = rows if rows.is_packed else None
    lengths = [(one.rows.num_queries, one.rows.num_keys) for one in rows.sequences()]
    asked = (rule_of(policy, num_blocks(num_keys, block_k), block_k) for _, num_keys in lengths)
    rules = [rule for rule in asked if rule is not None]
    start = choose_op if torch.compiler.is_compiling() else choose_rows
    keys = k_blocks.contiguous()
    sequences = None if packed is None else _sequences(packed, scorer, q.device)
    bits = values = None
    per_row = q.shape[0] * q.shape[1] * scorer.sub_blocks[0] * keys.shape[3] * keys.element_size()
    step = max(1, SUMMARY_BYTES // per_row) if packed is None else down
    for first in range(0, down, step):
        part = slice(first * block_q, min(rows.num_queries, (first + step) * block_q))
        queries = scorer.summarise_queries(q[:, :, part], positions=positions[..., part], rows=packed)
        if bits is None:
            heads = queries.shape[1]
            values = _values(rules, heads, packed is not None, q.device)
            shape = (q.shape[0], heads, down, num_blocks(columns, WORD))
            bits = torch.zeros(shape, dtype=torch.int32, device=q.device)
        start(
            queries.contiguous(),
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
    """
    heads, dim = queries.shape[1], queries.shape[3]
    block_q, block_k = block_size
    tokens, past = lengths[0], lengths[1] - lengths[0]
    batch, down = queries.shape[0], num_blocks(queries.shape[2], subs[0])
    if sequences is not None:
        batch, down = len(sequences), max(num_blocks(n, block_q) for n in lengths[::2])
    last = first + down
    # Rows of scores for each row of blocks.
    each = subs[0] if shares else 1
    launch = LAUNCHES[width(keys) + (" shares" if shares else "")]
    widths = [0] * down
    for queries_of_one, keys_of_one in zip(lengths[::2], lengths[1::2], strict=True):
        for row in range(first, min(last, num_blocks(queries_of_one, block_q))):
            keys_seen = min((row + 1) * block_q - queries_of_one, 0) + keys_of_one
            widths[row - first] = max(widths[row - first], num_blocks(keys_seen, block_k))
    # A packed sequence may see more in an earlier row than the ones that have later rows.
    widths = list(accumulate(widths, max))
    whole = max(1, launch.block_m // each)
    most = (SHARE_BYTES if shares else SCORE_BYTES) // (4 * batch * heads * each)
    chunks = list(_chunks(widths, most, whole))
    space = max((stop - start) * each * _stride(widths[stop - 1]) for start, stop in chunks)
    scores = torch.empty(batch * heads * space, dtype=torch.float32, device=queries.device)
    with torch.cuda.device_of(queries):
        for start, stop in chunks:
            seen = widths[stop - 1]
            tiles = num_blocks((stop - start) * each, launch.block_m) * num_blocks(seen, launch.block_n)
            _score[batch * heads, tiles](
                queries,
                keys,
                scores,
                sequences,
                queries.shape[2],
                keys.shape[2],
                start * each,
                stop * each,
                seen,
                _stride(seen),
                first * block_q + past,
                scale,
                HEADS=heads,
                GROUP=heads // keys.shape[1],
                E=dim,
                **_widths(dim, products(keys)),
                SUBS_Q=subs[0] // each,
                SUBS_K=subs[1],
                BLOCK_Q=block_q // each,
                BLOCK_K=block_k,
                EXACT=shares,
                RESIDENT=math.gcd(subs[0] // each, launch.resident),
                PRECISION=products(keys),
                **launch.tile(),
            )
            wide = max(WORD, power_of_two(seen))
            _choose[batch * heads, stop - start](
                scores,
                bits,
                sequences,
                first + start,
                stop - start,
                _stride(seen),
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
                KIND=kind,
                SLOPED=row_exponent != 0,
                WIDTH=wide,
                num_warps=min(16, max(1, wide // SCORES_PER_WARP)),
            )


def _sequences(rows: Rows, scorer: Any, device: torch.device) -> Tensor:
    """Where each packed sequence that has queries lies, int32 ``[S, 7]``, as `_score` and `_choose` read it.

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


def _widths(dim: int, precision: str) -> dict[str, int]:
    """Cover the summaries' values by one tile that is a power of two wide, or by two where that is less.

    Not where three products make one of fp32: added to what is there already they lose digits.
    """
    whole = padded(dim)
    low = whole // 2
    rest = padded(dim - low)
    if precision == "tf32x3" or low < 16 or low + rest == whole:
        return {"E_LOW": whole, "E_REST": 0}
    return {"E_LOW": low, "E_REST": rest}


def _chunks(widths: list[int], scores: int, tile: int) -> Iterator[tuple[int, int]]:
    """Rows ``start <= row < stop`` whose scores are at most ``scores`` per head, the last rows first."""
    stop = len(widths)
    while stop:
        rows = max(1, scores // _stride(widths[stop - 1]))
        # Whole tiles, as long as there is room for one.
        rows = rows // tile * tile or rows
        start = max(0, stop - rows)
        yield start, stop
        stop = start


def _stride(width: int) -> int:
    """Distance between rows of scores: rows begin at the edge of a cache line."""
    return num_blocks(width, WORD) * WORD


choose_op = torch.library.custom_op("seerattention::choose_rows", choose_rows, mutates_args=("bits",))
choose_op.register_fake(lambda *_: None)


@jit("query_subs", "key_subs", "start", "stop", "width", "past")
def _score(
    queries,
    keys,
    scores,
    sequences,
    query_subs,
    key_subs,
    start,
    stop,
    width,
    stride,
    past,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_LOW: tl.constexpr,
    E_REST: tl.constexpr,
    SUBS_Q: tl.constexpr,
    SUBS_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of block scores; rows count from the first query summary, at position ``past``.

    With EXACT, of the block that a row ends in only those summaries of keys count that begin by its end.
    """
    across = tl.cdiv(width, BLOCK_N)
    row = start + (tl.program_id(1) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(1) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(0).to(tl.int64)
    batch, first_q = head // HEADS, queries + head * query_subs * E
    last_q, last_k = query_subs - 1, key_subs - 1
    if sequences is not None:
        entry = sequences + batch * 7
        batch = tl.load(entry).to(tl.int64)
        first_q = queries + ((head % HEADS) * query_subs + tl.load(entry + 1)) * E
        last_q, last_k, past = tl.load(entry + 2) - 1, tl.load(entry + 3) - 1, tl.load(entry + 5)
    tile_first = start + (tl.program_id(1) // across) * BLOCK_M
    latest = past + (tile_first + BLOCK_M) * BLOCK_Q - 1
    wanted = (tl.program_id(1) % across) * BLOCK_N * BLOCK_K <= latest
    if sequences is not None:
        wanted &= tile_first * SUBS_Q <= last_q
    if wanted:
        first_k = keys + (batch * (HEADS // GROUP) + (head % HEADS) // GROUP) * key_subs * E
        ends = past + (row + 1) * BLOCK_Q - 1
        if EXACT and (tl.program_id(1) % across + 1) * BLOCK_N * BLOCK_K > past + tile_first * BLOCK_Q:
            best, _ = best_products(
                first_q, first_k, row, column, last_q, last_k, E, E_LOW, E_REST, SUBS_Q, SUBS_K, RESIDENT,
                PRECISION, False, ends, BLOCK_K // SUBS_K,
            )  # fmt: skip
        else:
            best, _ = best_products(
                first_q, first_k, row, column, last_q, last_k, E, E_LOW, E_REST, SUBS_Q, SUBS_K, RESIDENT,
                PRECISION, False, ends, 0,
            )  # fmt: skip
        to = scores + head * (stop - start) * stride
        kept = (row < stop)[:, None] & (column < width)[None, :]
        tl.store(to + (row - start)[:, None] * stride + column[None, :], best * scale, mask=kept)


@jit("first", "rows", "all_rows", "words", "tokens", "past", "sink", "local", "dense_from")
def _choose(
    scores,
    bits,
    sequences,
    first,
    rows,
    stride,
    all_rows,
    words,
    tokens,
    past,
    value,
    values,
    row_exponent,
    sink,
    local,
    dense_from,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KIND: tl.constexpr,
    SLOPED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Choose the blocks of one row; with EACH by the shares of so many query summaries' rows of scores."""
    row, head = first + tl.program_id(1), tl.program_id(0).to(tl.int64)
    row_of_bits = head * all_rows + row
    if sequences is not None:
        entry = sequences + (head // HEADS) * 7
        tokens, past, value = tl.load(entry + 4), tl.load(entry + 5), tl.load(values + head)
        row_of_bits = (head % HEADS) * all_rows + tl.load(entry + 6) + row
        dense_from += tl.cdiv(tokens, BLOCK_Q) - all_rows
        if row * BLOCK_Q >= tokens:
            return
    elif values is not None:
        value = tl.load(values + head % HEADS)
    last = (tl.minimum((row + 1) * BLOCK_Q, tokens) - 1 + past) // BLOCK_K
    own = (row * BLOCK_Q + past) // BLOCK_K
    block = tl.arange(0, WIDTH)
    valid = block <= last
    if EACH > 0:
        at = scores + (head * rows + tl.program_id(1)) * EACH * stride
        score = tl.full([WIDTH], float("-inf"), tl.float32)
        for sub in range(EACH):
            begins = row * BLOCK_Q + sub * (BLOCK_Q // EACH)
            seen = block * BLOCK_K < begins + BLOCK_Q // EACH + past
            product = tl.load(at + sub * stride + block, mask=valid & seen, other=float("-inf"))
            product -= tl.max(product, 0)
            share = product - tl.log(tl.sum(tl.exp(product), 0))
            score = tl.where(begins < tokens, tl.maximum(score, share), score)
    else:
        at = scores + (head * rows + tl.program_id(1)) * stride
        score = tl.load(at + block, mask=valid, other=float("-inf"))
    always = ((block < sink) | (block > own - local) | (row >= dense_from)) & valid
    if SLOPED:
        value *= tl.exp(row_exponent * tl.log((last + 1).to(tl.float32)))
    read = tl.sum(always.to(tl.int32), 0)
    taken = take(score, valid, always, read, value, KIND, 1) | always
    store_bits(taken & valid, bits + row_of_bits * words, words)
