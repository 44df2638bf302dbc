"""Pages of summaries beside vLLM's keys, which vLLM plans, allocates, shares and takes back."""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from seerattention.gate import AttnGate
from seerattention.hosts.vllm.served import served_in
from seerattention.hosts.vllm.summaries import Stale

#: Behind the name of the attention layer that they are of.
SUFFIX = ".seerattention"


@dataclass(frozen=True)
class SummaryTable:
    """Where a batch's summaries are.

    Attributes:
        table: int32 ``[rows, N]``, every row's pages of summaries, in order.
        stale: By row with sparse tokens, which of its pages hold other summaries than of their keys.
    """

    table: Tensor
    stale: dict[int, list[int]]


class SummaryBuilder(AttentionMetadataBuilder[SummaryTable]):
    """Looks up where a batch's summaries are, and notes which pages get keys without them."""

    # The least of all groups says whether the model runs in whole graphs.
    _cudagraph_support = AttentionCGSupport.ALWAYS
    #: Of the pages of this builder's layers, once they are there.
    stale: Stale | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> SummaryTable:
        """Return the batch's metadata."""
        served, table = served_in(self.vllm_config), common_attn_metadata.block_table_tensor
        assert served is not None
        if self.stale is None:
            pages = self.vllm_config.compilation_config.static_forward_context[self.layer_names[0]]
            self.stale = Stale(len(pages.kv_cache), pages.page_tokens, table.device)
        batch, found = served.look(common_attn_metadata), served.lengths(common_attn_metadata)
        sparse = set() if batch is None else batch.sparse
        return SummaryTable(table, self.stale.after(table, found.past, found.keys, sparse))


class SummaryBackend(AttentionBackend):
    """What vLLM asks about pages of summaries."""

    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    @staticmethod
    def get_name() -> str:
        """Return its name."""
        return "SEERATTENTION_SUMMARIES"

    @staticmethod
    def get_impl_cls() -> Any:
        """Refuse: nothing attends by it."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[SummaryBuilder]:
        """Return what looks pages up in a batch."""
        return SummaryBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Return which pages fit: all that keys may have."""
        return [MultipleOf(1)]


class SummaryPages(nn.Module, AttentionLayerBase):
    """Pages ``[pages, H, states, E]`` of a layer's summaries, which vLLM plans, allocates and binds.

    Args:
        gate: Makes the summaries, which are kept in its precision.
    """

    def __init__(self, gate: AttnGate) -> None:
        super().__init__()
        c = gate.config
        self.heads = c.num_kv_heads if c.q_proj else c.num_heads
        self.dim, self.tokens, self.dtype = c.dim, c.k_sub, gate.linear_k.weight.dtype
        self.kv_cache = torch.tensor([])

    @property
    def page_tokens(self) -> int:
        """Tokens whose summaries a page holds."""
        return self.kv_cache.shape[2] * self.tokens

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return what vLLM asks about the pages."""
        return SummaryBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """Return how many bytes a page takes."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.heads,
            head_size=self.dim,
            head_size_v=0,
            dtype=self.dtype,
            tokens_per_state=self.tokens,
        )
