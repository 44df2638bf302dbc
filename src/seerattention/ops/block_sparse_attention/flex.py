"""FlexAttention, compiled: PyTorch's own block-sparse kernels for CPU and GPU."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from seerattention.ops.options import Options
from seerattention.selection import BlockSelection

#: Kinds of calls (dtype, head dim, heads, block size, one block or several) compiled per process; the
#: default of 8 is for functions that should settle on one.
RECOMPILE_LIMIT = 128


def unsupported(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> list[str]:
    """Return the reasons why this backend cannot run."""
    reasons = []
    if q.device.type == "cpu":
        if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")):
            reasons.append("on a CPU it is compiled by a C++ compiler, and none is on the PATH")
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            reasons.append("it has no backward on a CPU")
    elif q.device.type != "cuda":
        reasons.append(f"it runs on cpu and cuda, not on {q.device.type}")
    if q.dtype == torch.float64:
        reasons.append("it has no float64 kernel")
    if sys.version_info >= (3, 14) and torch.__version__ < "2.10":
        reasons.append("torch.compile needs torch >= 2.10 on this Python")
    asked = {
        "softcap": options.softcap is not None,
        "sinks": options.sinks is not None,
        "return_lse": options.return_lse,
        "packed sequences": options.packed,
        "keys in pages": options.pages is not None,
    }
    return reasons + [f"it takes no {name}" for name, wanted in asked.items() if wanted]


def run(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options) -> tuple[Tensor, None]:
    """Return softmax attention over the selected causal tokens, ``[B, Hq, Tq, D]``."""
    mask = selection.to_flex(options.rows, q.shape[1])
    return attend(q, k, v, mask, selection.block_size, scale=options.scale), None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, block_size: tuple[int, int], *, scale: float
) -> Tensor:
    """Return attention over a selection as `BlockSelection.to_flex` writes it, ``[B, Hq, Tq, D]``."""
    kernel_options = None
    if q.device.type == "cuda":
        # The default tile is larger than a 64-token block and would be refused.
        block_q, block_k = block_size
        kernel_options = {"BLOCK_M": min(block_q, 128), "BLOCK_N": min(block_k, 64)}
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    gqa = q.shape[1] != k.shape[1]
    run_compiled = _compiled(dynamic=not q.is_cuda)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        out = run_compiled(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=kernel_options
        )
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _compiled(dynamic: bool) -> Callable[..., Tensor]:
    # On a CPU lengths stay symbolic, so that a new one is not a new compilation; on a GPU only fixed
    # ones are tested. fullgraph raises at the limit instead of running uncompiled, with the whole map.
    return torch.compile(flex_attention, dynamic=dynamic, fullgraph=True)
