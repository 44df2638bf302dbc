"""x86-64 CPUs: one read of the tokens in C++, ``summaries.cpp`` of `seerattention.ops.native`; no backward.

Sums are of fp32, rounded once, when the summary is made.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.native import DTYPES, address, differentiated, function, missing
from seerattention.ops.options import SummaryOptions
from seerattention.rows import num_blocks

#: Columns of a matrix are read by so many, whatever the CPU.
STEP = 16


class _Call(ctypes.Structure):
    """What the kernel is told; the same fields in the same order in summaries.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "x out weight norm cos sin edges".split()),
        ("strides", ctypes.c_int64 * 3),
        *(
            (name, ctypes.c_int64)
            for name in "batch heads tokens dim heads_out blocks width padded size merge turn_stride "
            "max_at min_at avg_at pools x_dtype out_dtype threads".split()
        ),
        ("eps", ctypes.c_double),
    )


def unsupported(x: Tensor, options: SummaryOptions) -> list[str]:
    """Return the reasons why this backend cannot run."""
    if x.device.type != "cpu":
        return [f"it runs on a CPU, not on {x.device.type}"]
    reasons = []
    if x.dtype not in DTYPES or options.dtype not in DTYPES:
        reasons.append("it takes float32, bfloat16 and float16")
    elif torch.promote_types(x.dtype, options.dtype) != options.dtype:
        reasons.append(f"it does not round tokens, {x.dtype}, before they are pooled, to {options.dtype}")
    if options.rounded_to is not None:
        reasons.append(f"it does not round to {options.rounded_to}")
    if differentiated(x, options.weight, options.norm):
        reasons.append("it has no backward")
    if why := missing():
        reasons.append(why)
    return reasons


def run(x: Tensor, options: SummaryOptions) -> Tensor:
    """Return the summaries, ``[B, H, N, E]``."""
    cos, sin = options.rotary or (None, None)
    edges = None if options.rows is None else options.rows.edges(x.shape[2], options.size, x.device)
    start = summarise_op if torch.compiler.is_compiling() else summarise
    return start(
        x, options.size, " ".join(options.pools), options.dtype, options.weight, options.merge, options.norm,
        options.eps, cos, sin, edges,
    )  # fmt: skip


def summarise(
    x: Tensor,
    size: int,
    pools: str,
    dtype: torch.dtype,
    weight: Tensor | None,
    merge: int,
    norm: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    edges: Tensor | None,
) -> Tensor:
    """Call the kernel; arguments as those of `run`, pools in one text, packed blocks by their edges.

    Raises:
        MemoryError: If there is no room to work in.
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    out = _empty(x, size, pools, dtype, weight, merge, edges)
    names, (_, heads_out, blocks, width) = pools.split(), out.shape
    padded = num_blocks(width, STEP) * STEP
    if weight is not None:
        weight = F.pad(weight.float(), (0, padded - width)).contiguous()
    norm, cos, sin = (None if t is None else t.float().contiguous() for t in (norm, cos, sin))
    pointers = map(address, (x, out, weight, norm, cos, sin, edges))
    places = (names.index(name) if name in names else -1 for name in ("max", "min", "avg"))
    call = _Call(
        *pointers, (ctypes.c_int64 * 3)(*x.stride()[:3]), *x.shape, heads_out, blocks, width, padded, size,
        merge, 0 if cos is None or cos.shape[0] == 1 else blocks * width, *places, len(names),
        DTYPES[x.dtype], DTYPES[dtype], torch.get_num_threads(), eps,
    )  # fmt: skip
    if function("seerattention_summarise")(ctypes.byref(call)):
        raise MemoryError(f"no room to summarise blocks of {size} tokens by the CPU's kernel")
    return out


def _empty(x: Tensor, size: int, pools: str, dtype: torch.dtype, weight: Tensor | None, *rest: Any) -> Tensor:
    merge, edges = rest[0], rest[-1]
    plain = x.shape[1] // merge, merge * len(pools.split()) * x.shape[3]
    heads, width = plain if weight is None else (weight.shape[0], weight.shape[2])
    blocks = num_blocks(x.shape[2], size) if edges is None else edges.shape[1]
    return x.new_empty((x.shape[0], heads, blocks, width), dtype=dtype)


summarise_op = torch.library.custom_op("seerattention::summarise_on_cpu", summarise, mutates_args=())
summarise_op.register_fake(_empty)
