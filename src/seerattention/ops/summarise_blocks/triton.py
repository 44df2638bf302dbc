"""One read of the tokens: pooling, projection, norm and rotation in one Triton kernel."""

# Triton reads annotations such as `tl.constexpr`, whose module may be missing.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.language import (
    DTYPES,
    INTERPRETED,
    cannot_round,
    jit,
    padded,
    products,
    tl,
    unsupported_here,
)
from seerattention.ops.launch import Launch
from seerattention.ops.options import SummaryOptions, pool_places
from seerattention.rows import num_blocks

#: Of a tile, ``block_m`` is the tokens and ``block_n`` how many of each block are loaded between two turns of
#: the loop. ``pool`` is for one pool without projection, ``wide`` for vectors of more than 256 bytes.
LAUNCHES = {
    "pool": Launch(1024, 8, 4, 1),
    "project": Launch(128, 2, 4, 1, programs=3),
    "wide": Launch(16, 2, 8, 1),
}

#: Bytes of the largest matrix of a head that a program keeps in shared memory, to go on from tile to tile.
HELD_BYTES = 48 * 2**10


def unsupported(x: Tensor, options: SummaryOptions) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = unsupported_here(x)
    dtype, weight, norm, rows = options.dtype, options.weight, options.norm, options.rows
    given = [t for t in (x, weight, norm) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        reasons.append("it has no backward; use backend='reference' for gradients")
    if rows is not None and rows.lengths is None:
        reasons.append("the host does not know the lengths of the packed sequences")
    if options.merge > 1:
        reasons.append("it does not merge heads")
    if weight is None and len(options.pools) > 1 and (norm is not None or options.rotary is not None):
        reasons.append("without a projection it neither normalises nor rotates several pools")
    if dtype not in DTYPES or x.dtype not in DTYPES or any(t.dtype != dtype for t in given[1:]):
        reasons.append(f"x, weight and norm must be float16, bfloat16 or float32, weights {dtype}")
    if INTERPRETED and dtype == torch.bfloat16 and weight is not None:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if max(x.shape[3], 0 if weight is None else weight.shape[2]) * dtype.itemsize > 512:
        reasons.append("it takes vectors of up to 512 bytes")
    if options.rounded_to is not None:
        if weight is None:
            reasons.append("without a projection it does not round")
        if INTERPRETED:
            reasons.append("Triton's interpreter rounds ties in eight bits away from zero")
        reasons += cannot_round(x.device, options.rounded_to)
    return reasons


def run(x: Tensor, options: SummaryOptions) -> Tensor:
    """Return the summaries, ``[B, H, N, E]``."""
    cos, sin = options.rotary or (None, None)
    edges = None if options.rows is None else options.rows.edges(x.shape[2], options.size, x.device)
    # An operator of torch costs tens of microseconds a call; only torch.compile needs one.
    start = summarise_op if torch.compiler.is_compiling() else summarise
    return start(
        x, options.size, " ".join(options.pools), options.dtype, options.weight, options.norm, options.eps,
        cos, sin, edges, options.out_dtype,
    )  # fmt: skip


def summarise(
    x: Tensor,
    size: int,
    pools: str,
    dtype: torch.dtype,
    weight: Tensor | None,
    norm: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    edges: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel; arguments as those of `run`, pools in one text, packed blocks by their edges."""
    out = _empty(x, size, pools, dtype, weight, edges, out_dtype)
    (batch, heads, tokens, width), (_, heads_out, blocks, dim) = x.shape, out.shape
    names = pools.split()
    if weight is None:
        dim = width
    kind = _kind(max(width, dim) * dtype.itemsize, projects=weight is not None or len(names) > 1)
    tile = _tile(LAUNCHES[kind], size)
    halves = padded(num_blocks(width, 2)), padded(num_blocks(dim, 2))
    nbytes = 4 * len(names) * halves[0] * halves[1] * dtype.itemsize
    held = weight is not None and heads_out == heads and nbytes <= HELD_BYTES
    programs = num_blocks(blocks, tile["ROWS"])
    if held:
        programs = min(programs, max(1, LAUNCHES[kind].most_programs(x.device) // (batch * heads)))
    with torch.cuda.device_of(x):
        _summarise[batch * heads, programs](
            x,
            None if weight is None else weight.contiguous(),
            norm,
            None if cos is None else cos.contiguous(),
            None if sin is None else sin.contiguous(),
            edges,
            out,
            tokens,
            blocks,
            *x.stride(),
            0 if cos is None or cos.shape[0] == 1 else blocks * dim,
            eps,
            HEADS=heads,
            GROUPS=heads_out // heads,
            D=width,
            E=dim,
            # Half of a vector each.
            D_PAD=halves[0],
            E_PAD=halves[1],
            SIZE=size,
            PLACES=pool_places(names),
            HELD=held,
            PRECISION=products(x),
            LARGEST=None if out_dtype == dtype else torch.finfo(out_dtype).max,
            **tile,
        )
    return out


def _empty(x: Tensor, size: int, pools: str, dtype: torch.dtype, weight: Tensor | None, *rest: Any) -> Tensor:
    edges, out_dtype = rest[-2:]
    plain = x.shape[1], len(pools.split()) * x.shape[3]
    heads, dim = plain if weight is None else (weight.shape[0], weight.shape[2])
    blocks = num_blocks(x.shape[2], size) if edges is None else edges.shape[1]
    return x.new_empty((x.shape[0], heads, blocks, dim), dtype=out_dtype)


summarise_op = torch.library.custom_op("seerattention::summarise_blocks", summarise, mutates_args=())
summarise_op.register_fake(_empty)


def _kind(nbytes: int, *, projects: bool) -> str:
    return "wide" if nbytes > 256 else "project" if projects else "pool"


def _tile(launch: Launch, size: int) -> dict[str, int]:
    # 16 rows are the least that a product takes; more than 64 do not fit into registers.
    rows = min(64, max(16, launch.block_m // size))
    rows = 1 << (rows.bit_length() - 1)
    unroll = math.gcd(size, launch.block_n)
    given = {"ROWS": rows, "UNROLL": unroll, "num_warps": launch.warps, "num_stages": launch.stages}
    if launch.registers and torch.version.hip is None:
        given["maxnreg"] = launch.registers
    return given


# Every vector is held as two halves, so that a rotation, which mixes entry i with entry i + E / 2, needs
# no exchange between threads.


@jit("tokens", "blocks")
def _summarise(
    x,
    weight,
    norm,
    cos,
    sin,
    edges,
    out,
    tokens,
    blocks,
    stride_b,
    stride_h,
    stride_t,
    stride_d,
    stride_turn,
    eps,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    HELD: tl.constexpr,
    PRECISION: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Summarise a head's blocks, `ROWS` at a time; PLACES are those of max, min and avg, -1 if not wanted.

    With LARGEST, that of the dtype of `out`, summaries are rounded to their own dtype first and then to it.
    """
    batch, head = (tl.program_id(0) // HEADS).to(tl.int64), (tl.program_id(0) % HEADS).to(tl.int64)
    E_HALF: tl.constexpr = (E + 1) // 2
    POOLS: tl.constexpr = (PLACES[0] >= 0) + (PLACES[1] >= 0) + (PLACES[2] >= 0)
    # Without a projection the pools lie behind one another.
    WIDTH: tl.constexpr = E if weight is not None else POOLS * E
    e = tl.arange(0, E_PAD)
    x += batch * stride_b + head * stride_h
    like = out.dtype.element_ty if weight is None else weight.dtype.element_ty
    kept = tl.float32 if weight is None else like
    parts = None
    if HELD:
        # One head's matrix stays in shared memory while blocks pass.
        parts = ()
        for part in tl.static_range(4 * POOLS):
            own = _part(weight + head * (POOLS * D * E), part, D, E, D_PAD, E_PAD)
            parts = parts + (own,)  # noqa: RUF005, Triton has no stars
    for tile in range(tl.program_id(1) * ROWS, blocks, tl.num_programs(1) * ROWS):
        row = tile + tl.arange(0, ROWS)
        here = (row < blocks)[:, None]
        kept_a, kept_b = here & (e < E_HALF)[None, :], here & (E_HALF + e < E)[None, :]
        pools = pool(
            x, edges, row, tokens, blocks, stride_t, stride_d, like, kept, D, D_PAD, SIZE, PLACES, ROWS,
            UNROLL,
        )  # fmt: skip
        for group in range(GROUPS):
            head_out = head * GROUPS + group
            w = weight
            if weight is not None:
                w = weight + head_out * (POOLS * D * E)
            turn = batch * stride_turn + row[:, None] * E + e[None, :]
            first, second = finish(
                pools, w, parts, norm, cos, sin, turn, kept_a, kept_b, eps, D, E, D_PAD, E_PAD, PLACES, ROWS,
                PRECISION,
            )  # fmt: skip
            if LARGEST is not None:
                first, second = _within(first.to(like), LARGEST), _within(second.to(like), LARGEST)
            to = out + ((batch * HEADS * GROUPS + head_out) * blocks + row[:, None]) * WIDTH + e[None, :]
            if WIDTH == E:
                tl.store(to, first, mask=kept_a)
                tl.store(to + E_HALF, second, mask=kept_b)
            else:
                for kind in tl.static_range(3):
                    if PLACES[kind] >= 0:
                        a, b = pools[kind]
                        tl.store(to + PLACES[kind] * E, a, mask=kept_a)
                        tl.store(to + PLACES[kind] * E + E_HALF, b, mask=kept_b)


@jit
def _within(number, LARGEST: tl.constexpr):
    return tl.minimum(tl.maximum(number.to(tl.float32), -LARGEST), LARGEST)


@jit
def _part(
    weight, number: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr
):
    """Load one of the four parts of a pool's ``[D, E]``, half of either; numbers go on from pool to pool."""
    D_HALF: tl.constexpr = (D + 1) // 2
    E_HALF: tl.constexpr = (E + 1) // 2
    d, e = tl.arange(0, D_PAD)[:, None], tl.arange(0, E_PAD)[None, :]
    row, column = (number // 2 % 2) * D_HALF + d, (number % 2) * E_HALF + e
    inside = (d < D_HALF) & (row < D) & (e < E_HALF) & (column < E)
    return tl.load(weight + (number // 4 * D + row) * E + column, mask=inside, other=0.0)


@jit
def finish(
    pools, weight, parts, norm, cos, sin, turn, kept_a, kept_b, eps, D: tl.constexpr, E: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Project pools by one head's weight, normalise and rotate by the angles at ``turn``; in two halves.

    ``parts`` are those of the weight, if they are loaded already.
    """
    E_HALF: tl.constexpr = (E + 1) // 2
    if weight is not None:
        first = tl.zeros([ROWS, E_PAD], tl.float32)
        second = first
        for kind in tl.static_range(3):
            if PLACES[kind] >= 0:
                for half in tl.static_range(2):
                    number = pools[kind][half]
                    if parts is not None:
                        a, b = parts[PLACES[kind] * 4 + half * 2], parts[PLACES[kind] * 4 + half * 2 + 1]
                    else:
                        a = _part(weight, PLACES[kind] * 4 + half * 2, D, E, D_PAD, E_PAD)
                        b = _part(weight, PLACES[kind] * 4 + half * 2 + 1, D, E, D_PAD, E_PAD)
                    first = tl.dot(number, a, first, input_precision=PRECISION)
                    second = tl.dot(number, b, second, input_precision=PRECISION)
    else:
        # The first that is wanted; where there are several they are stored as they are.
        first, second = pools[0 if PLACES[0] >= 0 else 1 if PLACES[1] >= 0 else 2]
    if norm is not None:
        e = tl.arange(0, E_PAD)
        first, second = _normalise(first, second, norm + e[None, :], eps, E)
    if cos is not None:
        cos_a = tl.load(cos + turn, mask=kept_a, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + turn, mask=kept_a, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + turn + E_HALF, mask=kept_b, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + turn + E_HALF, mask=kept_b, other=0.0).to(tl.float32)
        first, second = first * cos_a - second * sin_a, second * cos_b + first * sin_b
    return first, second


@jit
def pool(
    x,
    edges,
    row,
    tokens,
    blocks,
    stride_t,
    stride_d,
    like: tl.constexpr,
    kept: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Return the maxima, minima and means of `ROWS` blocks, each as two halves; unwanted ones are empty.

    Tokens are rounded to the type ``like`` first, what comes of them is of the type ``kept``.
    """
    D_HALF: tl.constexpr = (D + 1) // 2
    first, end = row * SIZE, tokens
    if edges is not None:
        first = tl.load(edges + row, mask=row < blocks, other=0)
        end = tl.load(edges + blocks + row, mask=row < blocks, other=1)
    count = tl.maximum(tl.minimum(end - first, SIZE), 1).to(tl.float32)[:, None]
    lo = tl.arange(0, D_PAD)
    highs, lows, means = (), (), ()
    # One half after the other: numbers of fp32 of both would not fit into registers.
    for half in tl.static_range(2):
        inside = (half * D_HALF + lo < tl.minimum(D, (half + 1) * D_HALF))[None, :]
        high = tl.full([ROWS, D_PAD], float("-inf"), tl.float32)
        low = -high
        total = tl.zeros([ROWS, D_PAD], tl.float32)
        for start in range(0, SIZE, UNROLL):
            for step in tl.static_range(UNROLL):
                token = first + start + step
                # Past the end the last token is read again: it is of the same block, so maxima and minima
                # stay; sums leave it out.
                at = x + tl.minimum(token, end - 1).to(tl.int64)[:, None] * stride_t
                at += (half * D_HALF + lo)[None, :] * stride_d
                number = tl.load(at, mask=inside, other=0.0).to(like).to(tl.float32)
                if PLACES[0] >= 0:
                    high = tl.maximum(high, number)
                if PLACES[1] >= 0:
                    low = tl.minimum(low, number)
                if PLACES[2] >= 0:
                    total += tl.where((token < end)[:, None], number, 0.0)
        highs = highs + (high.to(kept),)  # noqa: RUF005, Triton has no stars
        lows = lows + (low.to(kept),)  # noqa: RUF005
        means = means + ((total / count).to(kept),)  # noqa: RUF005
    return highs, lows, means


@jit
def _normalise(first, second, norm, eps, E: tl.constexpr):
    """Divide a vector in two halves by its root mean square and multiply by the norm's weight."""
    E_HALF: tl.constexpr = (E + 1) // 2
    e = tl.arange(0, first.shape[1])[None, :]
    square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    factor = (1 / tl.sqrt(square / E + eps))[:, None]
    first *= factor * tl.load(norm, mask=e < E_HALF, other=0.0).to(tl.float32)
    second *= factor * tl.load(norm + E_HALF, mask=E_HALF + e < E, other=0.0).to(tl.float32)
    return first, second
