"""One small Triton kernel per step: a program keeps the tail of a KV head and summarises what it finishes."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.language import (
    jit,
    padded,
    power_of_two,
    products,
    tl,
    unsupported_dtype,
    unsupported_here,
)
from seerattention.ops.launch import Launch
from seerattention.ops.options import pool_places
from seerattention.ops.summarise_blocks.triton import finish, pool
from seerattention.rows import num_blocks

#: ``block_m`` are the most summaries of a block, ``block_n`` how many tokens of each are loaded together.
LAUNCH = Launch(64, 8, 8, 1)


def unsupported(summaries: Tensor, tail: Tensor, k: Tensor, scorer: Any, lengths: Tensor) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_here(k)
    if not hasattr(scorer, "summary_options"):
        return [*reasons, f"{type(scorer).__name__} is no gate"]
    options = scorer.summary_options(_capacity(summaries, scorer), queries=False)
    if options is None:
        return [*reasons, "the gate's rotation depends on the length of the text"]
    if scorer.sub_blocks[1] > LAUNCH.block_m:
        reasons.append(f"it takes at most {LAUNCH.block_m} summaries a block, not {scorer.sub_blocks[1]}")
    reasons += unsupported_dtype(options.dtype)
    if summaries.dtype != options.dtype:
        reasons.append(f"it writes summaries of {options.dtype}, the gate's dtype, not {summaries.dtype}")
    if max(k.shape[3], options.weight.shape[2]) * options.dtype.itemsize > 512:
        reasons.append("it takes vectors of up to 512 bytes")
    reasons += [
        f"the last dimension of {name} must be contiguous, its stride is {x.stride(-1)}"
        for name, x in {"summaries": summaries, "tail": tail, "k": k}.items()
        if x.stride(-1) != 1
    ]
    return reasons


def run(summaries: Tensor, tail: Tensor, k: Tensor, scorer: Any, lengths: Tensor) -> None:
    """Write the tail, and the summaries of blocks that the new keys finish."""
    options = scorer.summary_options(_capacity(summaries, scorer), queries=False)
    cos, sin = options.rotary or (None, None)
    batch, kv_heads, tokens, head_dim = k.shape
    heads, dim = options.weight.shape[0], options.weight.shape[2]
    subs = scorer.sub_blocks[1]
    with torch.cuda.device_of(k):
        _update[(batch * kv_heads,)](
            summaries,
            tail,
            k,
            lengths,
            options.weight.contiguous(),
            options.norm,
            cos,
            sin,
            *(x.stride()[:3] for x in (summaries, tail, k)),
            summaries.shape[2],
            tokens,
            options.eps,
            KV_HEADS=kv_heads,
            GROUPS=heads // kv_heads,
            D=head_dim,
            E=dim,
            # Half of a vector each.
            D_PAD=padded(num_blocks(head_dim, 2)),
            E_PAD=padded(num_blocks(dim, 2)),
            BLOCK_K=tail.shape[2],
            BLOCK_T=power_of_two(tokens),
            SUBS=subs,
            ROWS=max(16, power_of_two(subs)),
            UNROLL=math.gcd(options.size, LAUNCH.block_n),
            PLACES=pool_places(options.pools),
            PRECISION=products(k),
            num_warps=LAUNCH.warps,
            num_stages=LAUNCH.stages,
        )


def _capacity(summaries: Tensor, scorer: Any) -> int:
    return summaries.shape[2] * scorer.tokens_per_summary


@jit("room", "tokens")
def _update(
    summaries,
    tail,
    k,
    lengths,
    weight,
    norm,
    cos,
    sin,
    summary_strides,
    tail_strides,
    k_strides,
    room,
    tokens,
    eps,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SUBS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    PLACES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a KV head's new keys to its tail; once they finish a block, write its ``SUBS`` summaries."""
    b, head = (tl.program_id(0) // KV_HEADS).to(tl.int64), (tl.program_id(0) % KV_HEADS).to(tl.int64)
    before = tl.load(lengths + b) - tokens
    token, d = tl.arange(0, BLOCK_T), tl.arange(0, 2 * D_PAD)
    here = (token < tokens)[:, None] & (d < D)[None, :]
    at = k + b * k_strides[0] + head * k_strides[1] + token[:, None] * k_strides[2] + d[None, :]
    new = tl.load(at, mask=here, other=0.0)
    tail += b * tail_strides[0] + head * tail_strides[1]
    place = (before % BLOCK_K + token)[:, None]
    tl.store(tail + place * tail_strides[2] + d[None, :], new, mask=here & (place < BLOCK_K))
    if before % BLOCK_K + tokens >= BLOCK_K:
        # The block is in the tail.
        tl.debug_barrier()
        POOLS: tl.constexpr = (PLACES[0] >= 0) + (PLACES[1] >= 0) + (PLACES[2] >= 0)
        E_HALF: tl.constexpr = (E + 1) // 2
        row, e = tl.arange(0, ROWS), tl.arange(0, E_PAD)
        pools = pool(
            tail, None, row, BLOCK_K, SUBS, tail_strides[2], 1, summaries.dtype.element_ty,
            summaries.dtype.element_ty, D, D_PAD, BLOCK_K // SUBS, PLACES, ROWS, UNROLL,
        )  # fmt: skip
        entry = before // BLOCK_K * SUBS + row
        kept = ((row < SUBS) & (entry < room))[:, None]
        kept_a, kept_b = kept & (e < E_HALF)[None, :], kept & (E_HALF + e < E)[None, :]
        turn = (entry.to(tl.int64) * (BLOCK_K // SUBS))[:, None] * E + e[None, :]
        for group in range(GROUPS):
            head_out = head * GROUPS + group
            first, second = finish(
                pools, weight + head_out * (POOLS * D * E), None, norm, cos, sin, turn, kept_a, kept_b, eps,
                D, E, D_PAD, E_PAD, PLACES, ROWS, PRECISION,
            )  # fmt: skip
            to = summaries + b * summary_strides[0] + head_out * summary_strides[1]
            to += entry.to(tl.int64)[:, None] * summary_strides[2] + e[None, :]
            tl.store(to, first, mask=kept_a)
            tl.store(to + E_HALF, second, mask=kept_b)
        # What is past it begins the next one, in the same places.
        tl.debug_barrier()
        place -= BLOCK_K
        tl.store(tail + place * tail_strides[2] + d[None, :], new, mask=here & (place >= 0))
