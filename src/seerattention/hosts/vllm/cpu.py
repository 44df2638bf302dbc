"""vLLM's backend for the CPU, with sparse prompts."""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from seerattention.hosts.vllm.backend import SparseBuilder, SparseImpl


class SparseCPUBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """Plans batches."""


class SparseCPUImpl(SparseImpl, CPUAttentionBackendImpl):
    """Computes them."""

    def cached(self, layer: Any, kv_cache: Tensor, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return a request's first keys and values; see `SparseImpl.cached`."""
        size, dim = kv_cache.shape[2], self.head_size
        halves = kv_cache.view(*kv_cache.shape[:2], 2 * size, dim)[pages[: -(-tokens // size)].long()].chunk(
            2, 2
        )
        k, v = (
            half.flatten(2)[:, :, order]
            .unflatten(2, (size, dim))
            .transpose(0, 1)
            .flatten(1, 2)[None, :, :tokens]
            for half, order in zip(halves, orders(layer.isa, size, dim, kv_cache.dtype), strict=True)
        )
        return k, v


class SparseCPUBackend(CPUAttentionBackend):
    """The backend that vLLM takes in place of its own."""

    @staticmethod
    def get_impl_cls() -> type[SparseCPUImpl]:
        """Return what computes a layer."""
        return SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SparseCPUBuilder]:
        """Return what plans a batch."""
        return SparseCPUBuilder


@functools.cache
def orders(isa: str, size: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return where in a page every value of its keys and of its values lies, int64 ``[size * dim]`` each.

    Asked of vLLM's own code, which lays them out as the processor's instructions want them.

    Args:
        isa: vLLM's name of those instructions.
        size: Tokens of a page.
        dim: Dimension of a head.
        dtype: Of the cache.
    """
    slots = torch.arange(size)
    places = [torch.zeros(size * dim, dtype=torch.long) for _ in range(2)]
    # What a value's token is, then which of its numbers: each exact in any precision.
    for weight, count in ((dim, size), (1, dim)):
        number = torch.arange(count, dtype=dtype).view((-1, 1) if weight > 1 else (1, -1))
        given = number.expand(size, dim)[:, None].contiguous()
        page = torch.zeros(1, 1, 2 * size, dim, dtype=dtype).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            given, given, *page, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        for place, half in zip(places, page, strict=True):
            place += weight * half.flatten().long()
    keys, values = (torch.empty_like(place).scatter_(0, place, torch.arange(size * dim)) for place in places)
    return keys, values
