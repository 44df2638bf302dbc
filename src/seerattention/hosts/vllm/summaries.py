"""Summaries of blocks kept in pages beside vLLM's keys: the same block table says where both are."""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from seerattention.engine.call import AttentionCall, Unrotate
from seerattention.gate import AttnGate
from seerattention.rows import num_blocks

#: Behind the name of the attention layer that they are of.
SUFFIX = ".seerattention"


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
    def get_builder_cls() -> Any:
        """Return what looks pages up in a batch."""
        from seerattention.hosts.vllm.backend import SummaryBuilder

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


class Paged:
    """The summaries of one request's keys in one layer; `engine.call.Summaries` of a prompt's pieces.

    Args:
        pages: The layer's.
        table: int64 ``[N]``, the request's pages in order.
        stale: Which of them hold other summaries than of their keys.
        page_tokens: Tokens of a page.
    """

    def __init__(self, pages: Tensor, table: Tensor, stale: list[int], page_tokens: int) -> None:
        self.pages, self.table, self.stale, self.page_tokens = pages, table, stale, page_tokens
        self.tokens, self.size = 0, 0

    def follow(
        self, call: AttentionCall, scorer: AttnGate, unrotate: Unrotate | None, *, compare: bool = True
    ) -> tuple[str | None, ...]:
        """Write the summaries of blocks that have new tokens, and of stale pages."""
        assert unrotate is not None
        self.tokens, self.size = call.rows.num_keys, scorer.tokens_per_summary
        past, block = call.rows.first, scorer.block_size[1]
        self._write(call, scorer, unrotate, past // block * block, self.tokens)
        for page in self.stale:
            begin = page * self.page_tokens
            if begin < past:
                self._write(call, scorer, unrotate, begin, min(begin + self.page_tokens, self.tokens))
        self.stale = []
        return (None,)

    def _write(self, call: AttentionCall, scorer: AttnGate, unrotate: Unrotate, begin: int, end: int) -> None:
        positions = torch.arange(begin, end, device=call.given.k.device)
        keys = unrotate(call.layer, call.given.k[:, :, begin:end], positions[None])
        made = scorer.compress(keys, positions=positions)[0].transpose(0, 1)
        state = torch.arange(len(made), device=made.device) + begin // self.size
        per_page = self.page_tokens // self.size
        self.pages[self.table[state // per_page], :, state % per_page] = made.to(self.pages.dtype)

    def read(self) -> Tensor:
        """Return the summaries of all keys so far, ``[1, H, N, E]``."""
        states = num_blocks(self.tokens, self.size)
        pages = self.table[: num_blocks(self.tokens, self.page_tokens)]
        return self.pages[pages].transpose(0, 1).flatten(1, 2)[None, :, :states]


@dataclass(frozen=True)
class SummaryTable:
    """Where a batch's summaries are.

    Attributes:
        table: int32 ``[rows, N]``, every row's pages of summaries, in order.
        stale: By row with sparse tokens, which of its pages hold other summaries than of their keys.
    """

    table: Tensor
    stale: dict[int, list[int]]


class Stale:
    """Which pages of a block table hold summaries of other keys than those that they hold.

    vLLM's own kernels write keys and no summaries: in decoding, whose layers may be replayed as graphs. What
    a pass writes is known before it begins, so it is noted then.

    Args:
        pages: How many there are.
        page_tokens: Tokens of a page.
        device: Of the block table.
    """

    def __init__(self, pages: int, page_tokens: int, device: torch.device) -> None:
        self.stale = torch.ones(pages, dtype=torch.bool, device=device)
        self.page_tokens = page_tokens

    def after(
        self, table: Tensor, past: list[int], keys: list[int], sparse: set[int]
    ) -> dict[int, list[int]]:
        """Note what a pass writes, and return which of their pages sparse rows find stale before it.

        Args:
            table: int ``[rows, N]``, every row's pages.
            past: Of every row, how many tokens there are before the pass, and
            keys: after it.
            sparse: Rows that bring all of their pages up to date.
        """
        found = {}
        for row in sparse:
            pages = table[row, : num_blocks(keys[row], self.page_tokens)].long()
            found[row] = self.stale[pages].nonzero().flatten().tolist()
        for row, (before, after) in enumerate(zip(past, keys, strict=True)):
            first = 0 if row in sparse else before // self.page_tokens
            if after > before:
                pages = table[row, first : num_blocks(after, self.page_tokens)].long()
                self.stale[pages] = row not in sparse
        return found
