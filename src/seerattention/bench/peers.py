"""What sparse attention is compared with: dense kernels, FlexAttention, and any function of yours."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seerattention.rows import Rows
from seerattention.selection import BlockSelection

#: Computes attention of q ``[B, Hq, T, D]``, k and v ``[B, Hk, T, D]`` ; dense ones ignore the selection.
Peer = Callable[[Tensor, Tensor, Tensor, BlockSelection], Tensor]

#: Bytes of FlexAttention's index lists above which it is left out: they hold every block pair as int32,
#: twice, and making them takes several times that.
FLEX_BYTES = 600 * 2**20


def dense_peers(device: str, names: list[str]) -> dict[str, Peer]:
    """Return the dense kernels to compare with, best first.

    Args:
        device: ``cpu`` or ``cuda``. A CPU has one, torch's own choice.
        names: Which of ``cudnn`` and ``fa2`` on a GPU.

    Raises:
        ValueError: If none is left to measure speedups by.
    """
    if torch.device(device).type == "cpu":
        return {"dense sdpa": functools.partial(_sdpa, None)}
    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    found: dict[str, Peer] = {
        f"dense {name}": functools.partial(_sdpa, kind) for name, kind in kinds.items() if name in names
    }
    if not found:
        raise ValueError(
            f"--peers must name a dense kernel, cudnn or fa2, to measure speedups by; got {names}"
        )
    return found


def _sdpa(kind: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    if kind is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    # torch's default order prefers FA2 on GPUs where cuDNN is faster.
    with sdpa_kernel(kind):
        try:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        except RuntimeError as error:
            # The words on a GPU and those on a CPU.
            if not str(error).startswith(("No available kernel", "No viable backend")):
                raise
            raise NotImplementedError(f"{kind.name} cannot run {list(q.shape)} {q.dtype} here") from error


def flex_bytes(selection: BlockSelection, heads: int) -> int:
    """Return the bytes of FlexAttention's lists for a selection."""
    batch, _, nq, nk = selection.shape
    return 2 * 4 * batch * heads * nq * nk


def flex(q: Tensor, k: Tensor, selection: BlockSelection) -> Peer:
    """Return FlexAttention for one selection, whose lists are made here and not timed."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = selection.to_flex(Rows.last(q.shape[2], k.shape[2]), q.shape[1])
    block_q, block_k = selection.block_size
    # The default tile is larger than a 64-token block and would be refused.
    options: Any = {"BLOCK_M": min(block_q, 128), "BLOCK_N": min(block_k, 64)}
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def peer(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(q, k, v, block_mask=mask, enable_gqa=gqa, kernel_options=options)

    return peer


def load(name: str) -> Peer:
    """Import a peer given as ``module:function``.

    Raises:
        ValueError: If the text has another form, or the module no such function.
        ModuleNotFoundError: If there is no such module.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"--peer must be module:function, got {name!r}")
    try:
        found: Peer | None = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--peer {name}: {error}; is its folder on PYTHONPATH?") from error
    if not callable(found):
        raise ValueError(f"--peer {name}: {module} has no function {function!r}")
    return found
