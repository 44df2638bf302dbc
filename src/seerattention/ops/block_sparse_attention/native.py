"""x86-64 CPUs: a kernel in C++, forward only, ``attention.cpp`` of `seerattention.ops.native`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from seerattention.ops.native import DTYPES, address, differentiated, function, missing
from seerattention.ops.options import Options
from seerattention.selection import BlockSelection

#: A compiler of PyTorch cannot look into it.
OPAQUE = True

#: A tile's scores are of 16 keys at least and its output of 16 numbers of a head; the most it has room for.
STEP, MOST_DIM = 16, 256


class _Call(ctypes.Structure):
    """What the kernel is told; the same fields in the same order in attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "q k v out lse bits sinks lengths pages".split()),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in "q k v out".split()),
        *(
            (name, ctypes.c_int64)
            for name in "batch heads kv_heads dim sequences selections selection_heads rows words block_q "
            "block_k queries dtype threads page_tokens pages_each".split()
        ),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    if q.device.type != "cpu":
        return [f"it runs on a CPU, not on {q.device.type}"]
    reasons = []
    if q.dtype not in DTYPES:
        reasons.append(f"it takes float32, bfloat16 and float16, not {q.dtype}")
    if q.shape[3] % STEP or q.shape[3] > MOST_DIM:
        reasons.append(f"head_dim must be a multiple of {STEP} up to {MOST_DIM}, got {q.shape[3]}")
    if selection.block_size[1] % STEP:
        reasons.append(f"KV blocks must be of a multiple of {STEP} tokens, got {selection.block_size[1]}")
    if differentiated(q, k, v, options.sinks):
        reasons.append("it has no backward")
    if why := missing():
        reasons.append(why)
    return reasons


def run(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``, and its lse if asked.

    Raises:
        IndexError: If keys are in a page that there is not.
        MemoryError: If there is no room for a packed copy of a few KV heads.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if options.return_lse else None
    bits = selection.bits.contiguous()
    sinks = None if options.sinks is None else options.sinks.to(torch.float32).contiguous()
    lengths = torch.tensor(options.rows.known, dtype=torch.int64)
    pages = None if options.pages is None else _checked(options.pages, k, lengths)
    pointers = map(address, (q, k, v, out, lse, bits, sinks, lengths, pages))
    strides = ((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v, out))
    batch, heads, queries, dim = q.shape
    call = _Call(
        *pointers, *strides, batch, heads, k.shape[1], dim, len(lengths), *bits.shape, *selection.block_size,
        queries, DTYPES[q.dtype], torch.get_num_threads(), k.shape[2], 0 if pages is None else pages.shape[1],
        options.scale, options.softcap or 0.0,
    )  # fmt: skip
    if function("seerattention_attend")(ctypes.byref(call)):
        raise MemoryError(f"no room to pack {k.shape[2]} keys and values for the CPU's kernel")
    return out, lse


def _checked(pages: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
    """Return a block table behind one another; the kernel does not check it."""
    used = torch.arange(pages.shape[1]) * k.shape[2] < lengths[:, 1:]
    wrong = pages[used.expand_as(pages) & ((pages < 0) | (pages >= len(k)))]
    if len(wrong):
        raise IndexError(f"pages name page {int(wrong[0])}, but k and v have {len(k)}")
    return pages.contiguous()
