"""What the kernel that scores and chooses blocks is told; ``choosing.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from seerattention.ops.native import DTYPES, address, function, missing


class _Call(ctypes.Structure):
    """The same fields in the same order in choosing.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "queries keys scores bits lengths values".split()),
        *(
            (name, ctypes.c_int64)
            for name in "batch heads kv_heads dim sequences query_summaries key_summaries rows columns words "
            "block_q block_k subs_q subs_k causal shares kind sink local dense_rows dtype threads".split()
        ),
        ("scale", ctypes.c_double),
        ("exponent", ctypes.c_double),
    )


def unsupported(summaries: Tensor) -> list[str]:
    """Return the reasons why the kernel cannot take summaries of keys, and queries alike."""
    if summaries.device.type != "cpu":
        return [f"it runs on a CPU, not on {summaries.device.type}"]
    reasons = []
    if summaries.dtype not in DTYPES:
        reasons.append(f"it takes summaries in float32, bfloat16 and float16, not {summaries.dtype}")
    if summaries.shape[3] % 2:
        reasons.append(f"summaries must be of an even count of numbers, got {summaries.shape[3]}")
    if why := missing():
        reasons.append(why)
    return reasons


def choose(
    queries: Tensor,
    keys: Tensor,
    out: Tensor,
    lengths: Sequence[int],
    block_size: Sequence[int],
    subs: Sequence[int],
    causal: bool,
    shares: bool,
    scale: float,
    kind: int = 0,
    values: Tensor | None = None,
    exponent: float = 0.0,
    knobs: Sequence[int] | None = None,
) -> None:
    """Write the scores of block pairs, or the bits of the blocks that a rule takes.

    Args:
        queries: Summaries of queries, ``[B, H, Sq, E]``; of packed sequences behind one another.
        keys: Summaries of keys, ``[B, Hk, Sk, E]`` of the same dtype; of packed sequences ``[S, Hk, Sk, E]``.
        out: fp32 ``[B, H, Nq, Nk]`` for scores, or int32 ``[B, H, Nq, words]`` for bits; written whole.
        lengths: Queries and keys, one after the other of every packed sequence.
        block_size: Tokens per (query block, KV block).
        subs: Summaries per (query block, KV block).
        causal: Whether later blocks are left out.
        shares: Whether shares are compared, see `score_blocks`.
        scale: Factor of the scores.
        kind: Of the rule, its place in ``KINDS``.
        values: Of the rule, fp64 ``[sequences, H]``; needed for bits.
        exponent: Of the rule, ``row_exponent``.
        knobs: Sink blocks, local blocks, dense last rows; default none but a row's own blocks.

    Raises:
        MemoryError: If there is no room for a packed copy of the keys.
    """
    queries, keys = queries.contiguous(), keys.contiguous()
    pairs = torch.tensor(lengths, dtype=torch.int64)
    columns = -(-max(lengths[1::2]) // block_size[1])
    as_bits = out.dtype == torch.int32
    tensors = queries, keys, None if as_bits else out, out if as_bits else None, pairs, values
    pointers = map(address, tensors)
    batch, heads, query_summaries, dim = queries.shape
    call = _Call(
        *pointers, batch, heads, keys.shape[1], dim, len(lengths) // 2, query_summaries, keys.shape[2],
        out.shape[2], columns, out.shape[3], *block_size, *subs, causal, shares, kind, *(knobs or (0, 1, 0)),
        DTYPES[queries.dtype], torch.get_num_threads(), scale, exponent,
    )  # fmt: skip
    if function("seerattention_choose")(ctypes.byref(call)):
        raise MemoryError(f"no room to pack {keys.shape[2]} summaries of keys for the CPU's kernel")


choose_op = torch.library.custom_op("seerattention::choose_on_cpu", choose, mutates_args=("out",))
choose_op.register_fake(lambda *_: None)
