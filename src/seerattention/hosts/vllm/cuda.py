"""vLLM's backends for CUDA, FlashAttention's and Triton's, with sparse prompts."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from seerattention.hosts.vllm.backend import SparseBuilder, SparseImpl
from seerattention.hosts.vllm.gather import gathered


class SparseCUDAImpl(SparseImpl):
    """Computes batches on pages of either backend, which hold a token's keys and values side by side."""

    def cached(self, layer: Any, kv_cache: Tensor, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return a request's first keys and values; see `SparseImpl.cached`."""
        return gathered(kv_cache, pages, tokens)


class SparseFlashBuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    """Plans batches."""


class SparseFlashImpl(SparseCUDAImpl, FlashAttentionImpl):
    """Computes them."""


class SparseFlashBackend(FlashAttentionBackend):
    """The backend that vLLM takes in place of FlashAttention's."""

    @staticmethod
    def get_impl_cls() -> type[SparseFlashImpl]:
        """Return what computes a layer."""
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[SparseFlashBuilder]:
        """Return what plans a batch."""
        return SparseFlashBuilder


class SparseTritonBuilder(SparseBuilder, TritonAttentionMetadataBuilder):
    """Plans batches."""


class SparseTritonImpl(SparseCUDAImpl, TritonAttentionImpl):
    """Computes them."""


class SparseTritonBackend(TritonAttentionBackend):
    """The backend that vLLM takes in place of Triton's."""

    @staticmethod
    def get_impl_cls() -> type[SparseTritonImpl]:
        """Return what computes a layer."""
        return SparseTritonImpl

    @staticmethod
    def get_builder_cls() -> type[SparseTritonBuilder]:
        """Return what plans a batch."""
        return SparseTritonBuilder
