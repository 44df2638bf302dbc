"""Other libraries' block-sparse attention, for ``seerattention bench prefill --peer``.

    PYTHONPATH=. seerattention bench prefill --peers cudnn,fa4 --peer benchmarks.peers:flash_attention_4 ...

Each takes q ``[1, Hq, T, D]``, k and v ``[1, Hk, T, D]`` on a GPU and a selection of square blocks, and
returns ``[1, Hq, T, D]``. Lists and plans that it makes of a selection are made in the first call, which is
not timed. ThunderKittens' kernel in fastvideo-kernel and FlashInfer's ``cake`` know no causal mask: they read
all of the blocks on the diagonal, which is other attention, so that they cannot be checked here.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seerattention.selection import BlockSelection

#: Workspaces of FlashInfer, bytes: what it computes in, and what its planner needs for long texts.
WORKSPACE, PLAN = 256 << 20, 128 << 20

#: Selections whose lists are kept.
KEPT = 32


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Tensor:
    """FlashAttention-4's block-sparse attention (flash-attn-4), which masks blocks of the diagonal alone."""
    found = _module("flash_attn.cute", "flash-attn-4").flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=q.shape[3] ** -0.5, pack_gqa=False,
        mask_mod=_causal(), block_sparse_tensors=_blocks(selection, q.shape[1]),
    )  # fmt: skip
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.transpose(1, 2)


@functools.cache
def _causal() -> Callable[..., Any]:
    cute = _module("cutlass.cute", "nvidia-cutlass-dsl")

    @cute.jit
    def causal(batch: Any, head: Any, query: Any, key: Any, lengths: Any, more: Any) -> Any:
        return query >= key

    return causal


@functools.lru_cache(KEPT)
def _blocks(selection: BlockSelection, heads: int) -> Any:
    """Return a selection as FlashAttention-4 takes it: the diagonal, which is masked, and the rest."""
    library = _module("flash_attn.cute.block_sparsity", "flash-attn-4")
    mask = selection.to_mask()
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    blocks = mask.shape[2]
    diagonal = torch.arange(blocks, dtype=torch.int32, device=mask.device)
    mask[:, :, diagonal, diagonal] = False
    counts = mask.sum(-1, dtype=torch.int32)
    # Lists, ascending and padded to the longest; a stable sort in pieces that fit beside the tensors.
    longest = max(1, int(counts.max()))
    order = [head.byte().sort(dim=-1, descending=True, stable=True)[1] for head in mask[0]]
    lists = torch.stack([head[:, :longest].int() for head in order])[None].contiguous()
    own = diagonal.view(1, 1, blocks, 1).expand(1, heads, blocks, 1).contiguous()
    return library.BlockSparseTensorsTorch(
        torch.ones_like(counts), own, counts, lists, block_size=selection.block_size
    )  # fmt: skip


def flashinfer(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Tensor:
    """FlashInfer's attention of blocks of any size (flashinfer-python), by its FlashAttention-2 kernels."""
    # Its selections are one per KV head: keys are copied for every head of a selection.
    heads = selection.shape[1]
    copies = heads // k.shape[1]
    keys, values = (x[0].repeat_interleave(copies, 0) for x in (k, v))
    out: Tensor = _planned(selection, q.shape[1], q.shape[3], q.dtype).run(q[0], keys, values)
    return (out if out.shape[0] == q.shape[1] else out.transpose(0, 1))[None]


@functools.lru_cache(KEPT)
def _planned(selection: BlockSelection, heads: int, dim: int, dtype: torch.dtype) -> Any:
    library = _module("flashinfer", "flashinfer-python")
    mask, device = selection.to_mask()[0], selection.bits.device
    wrapper = library.VariableBlockSparseAttentionWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device), backend="fa2"
    )
    # Its own plan buffers are too small for tens of thousands of rows.
    wrapper._int_workspace_buffer = torch.empty(PLAN, dtype=torch.uint8, device=device)
    wrapper._pin_memory_int_workspace_buffer = torch.empty(PLAN, dtype=torch.uint8, pin_memory=True)
    sizes = torch.full(mask.shape[:2], selection.block_size[0], dtype=torch.int32, device=device)
    wrapper.plan(
        mask, sizes, sizes, heads, len(mask), dim, causal=True, q_data_type=dtype, kv_data_type=dtype
    )
    return wrapper


def _module(name: str, package: str) -> Any:
    """Import a library's module.

    Raises:
        NotImplementedError: If it is not installed: what is measured goes on without it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotImplementedError(
            f"peer {name}: {error}; `{sys.executable} -m pip install {package}` brings it"
        ) from error
