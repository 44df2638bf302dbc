"""What sparse attention is compared with: dense kernels, other libraries, and any function of yours."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seerattention.ops import flash_attention_4
from seerattention.ops.block_sparse_attention import flex as flex_backend
from seerattention.rows import Rows
from seerattention.selection import BlockSelection

#: Computes attention of q ``[B, Hq, T, D]``, k and v ``[B, Hk, T, D]`` ; dense ones ignore the selection.
Peer = Callable[[Tensor, Tensor, Tensor, BlockSelection], Tensor]

#: A dense kernel: one of torch's, its own choice for None, or FlashAttention-4.
Kind = SDPBackend | Literal["fa4"] | None

#: Dense kernels of a GPU; the last is there where flash-attn-4 is installed, and for prefill.
DENSE: dict[str, Kind] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fa2": SDPBackend.FLASH_ATTENTION,
    "fa4": "fa4",
}

#: Bytes of FlexAttention's index lists above which it is left out: they hold every block pair as int32,
#: twice, and making them takes several times that.
FLEX_BYTES = 600 * 2**20

#: Workspace of FlashInfer, bytes.
FLASHINFER_BYTES = 256 * 2**20


def dense_peers(
    device: str, names: list[str], run: Callable[..., Tensor] | None = None
) -> dict[str, Callable[..., Tensor]]:
    """Return the dense kernels to compare with, best first.

    Args:
        device: ``cpu`` or ``cuda``. A CPU has one, torch's own choice.
        names: Which of ``cudnn``, ``fa2`` and ``fa4`` on a GPU.
        run: What is done with a kernel; default `dense`, prefill.

    Raises:
        ValueError: If none is left to measure speedups by.
    """
    if torch.device(device).type == "cpu":
        return {"dense sdpa": functools.partial(run or dense, None)}
    found = {
        f"dense {name}": functools.partial(run or dense, kind)
        for name, kind in DENSE.items()
        if name in names
    }
    if not found:
        raise ValueError(
            f"peers must name a dense kernel, one of {', '.join(DENSE)}, to measure speedups by; got {names}"
        )
    return found


def dense(
    kind: Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """Compute attention by a dense kernel.

    Raises:
        NotImplementedError: If that kernel cannot.
    """
    if kind == "fa4":
        if reasons := flash_attention_4.unsupported(q, k, v):
            raise NotImplementedError(f"dense fa4: {'; '.join(reasons)}")
        return flash_attention_4.attend(q, k, v, scale=q.shape[-1] ** -0.5)
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
    if kind is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    # torch's default order prefers FA2 on GPUs where cuDNN is faster.
    with sdpa_kernel(kind):
        try:
            return F.scaled_dot_product_attention(q, k, v, **options)
        except RuntimeError as error:
            # The words on a GPU and those on a CPU.
            if not str(error).startswith(("No available kernel", "No viable backend")):
                raise
            raise NotImplementedError(f"{kind.name} cannot run {list(q.shape)} {q.dtype} here") from error


def dense_step(kind: Kind, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to a whole cache with one token per sequence, which needs no mask; see `dense`.

    Returns:
        The numbers of ``[B, Hq, 1, D]``, maybe in another shape.
    """
    if kind != SDPBackend.CUDNN_ATTENTION:
        # A group's query heads as the rows of one query block: the others read keys once per row block.
        q = q.view(len(q), k.shape[1], -1, q.shape[3])
    return dense(kind, q, k, v, causal=False)


def flashinfer(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Callable[[], Tensor]:
    """Return FlashInfer's paged decoding of one selection, planned here and not timed.

    It knows no lists per KV head; every head of every sequence becomes a request of its own, whose pages are
    the blocks selected. A cache ``[B, Hk, T, D]`` in one piece is such pages already.

    Args:
        q: ``[B, Hq, 1, D]``.
        k: ``[B, Hk, T, D]``, whole blocks.
        v: Shaped as k.
        selection: ``[B, Hk, 1, T / b]``.
    """
    library = importlib.import_module("flashinfer")
    (batch, heads, _, dim), block = k.shape, selection.block_size[1]
    offsets, blocks = selection.rows()
    counts = selection.counts.flatten()
    first = torch.arange(batch * heads, dtype=torch.int32, device=k.device) * selection.shape[3]
    workspace = torch.empty(FLASHINFER_BYTES, dtype=torch.uint8, device=k.device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        offsets.int(), blocks + first.repeat_interleave(counts), torch.full_like(first, block),
        q.shape[1] // heads, 1, dim, block, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    queries = q.reshape(batch * heads, -1, dim)
    pages = k.view(-1, 1, block, dim), v.view(-1, 1, block, dim)
    return lambda: wrapper.run(queries, pages)


def flex(q: Tensor, k: Tensor, selection: BlockSelection) -> Peer:
    """Return FlexAttention for one selection, whose lists are made here and not timed."""
    mask = selection.to_flex(Rows.last(q.shape[2], k.shape[2]), q.shape[1])
    return lambda q, k, v, selection: flex_backend.attend(
        q, k, v, mask, selection.block_size, scale=q.shape[-1] ** -0.5
    )


def load(name: str) -> Peer:
    """Import a peer given as ``module:function``.

    Raises:
        ValueError: If the text has another form, or the module no such function.
        ModuleNotFoundError: If there is no such module.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"a peer must be module:function, got {name!r}")
    try:
        found: Peer | None = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"peer {name}: {error}; is its folder on PYTHONPATH?") from error
    if not callable(found):
        raise ValueError(f"peer {name}: {module} has no function {function!r}")
    return found
