"""FlashAttention-4 for dense attention on Hopper GPUs, where the package flash-attn-4 is installed.

It is 5 % faster than cuDNN there at 32k tokens and 18 % at 128k (docs/kernels.md). What else it could do,
windows, soft-caps, sinks and later queries, was not run here on a GPU and is left to others. It compiles a
kernel for each kind, which takes seconds in the first call of a process; with
``FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1`` it keeps them for later processes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The package on PyPI, and the module in it.
PACKAGE, MODULE = "flash-attn-4", "flash_attn.cute"

#: Tokens from which it is taken.
LEAST = 1 << 14

#: What it was run with.
DTYPE, HEAD_DIM = torch.bfloat16, 128


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Return the reasons why it does not compute causal attention of q ``[B, Hq, Tq, D]``, k and v."""
    if q.device.type != "cuda":
        return ["it needs a Hopper GPU"]
    reasons = _absent() + _elsewhere(q.device)
    if q.dtype != DTYPE:
        reasons.append(f"it is asked for bfloat16, not {str(q.dtype).removeprefix('torch.')}")
    if q.shape[3] != HEAD_DIM:
        reasons.append(f"it is asked for heads of {HEAD_DIM} numbers, not {q.shape[3]}")
    if q.shape[2] != k.shape[2]:
        reasons.append(f"it is asked for as many queries as keys, not {q.shape[2]} and {k.shape[2]}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        reasons.append("its gradients are not used here")
    return reasons


def pays(q: Tensor, k: Tensor) -> bool:
    """Whether attention is so long that it is worth to be asked; not where torch compiles what calls it."""
    return q.is_cuda and min(q.shape[2], k.shape[2]) >= LEAST and not torch.compiler.is_compiling()


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Causal attention; see `dense_attention.dense_attention`."""
    # Its tensors have tokens before heads; strides are as they are.
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    with torch.cuda.device(q.device):
        found = _function()(*tensors, softmax_scale=scale, causal=True)
    # Some versions return the logarithms of the sums as well, or None for them.
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.transpose(1, 2)


@functools.cache
def _absent() -> list[str]:
    # Looked up without importing it, which takes seconds.
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return [f"{PACKAGE} is not installed; `pip install {PACKAGE}` brings it"]
    return []


@functools.cache
def _elsewhere(device: torch.device) -> list[str]:
    if torch.cuda.get_device_capability(device) == (9, 0):
        return []
    return [f"it was measured on Hopper GPUs (sm_90), this is {torch.cuda.get_device_name(device)}"]


@functools.cache
def _function() -> Callable[..., Any]:
    found: Callable[..., Any] = importlib.import_module(MODULE).flash_attn_func
    return found
