"""What every backend of vLLM's is given: plans of batches, and attention by them."""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

from seerattention.hosts.vllm.metrics import count_tokens
from seerattention.hosts.vllm.pages import SUFFIX, SummaryPages, SummaryTable
from seerattention.hosts.vllm.served import Batch, Served, served_in
from seerattention.hosts.vllm.settings import Settings
from seerattention.hosts.vllm.summaries import Paged

#: Where a batch's metadata holds its plan.
PLAN = "seerattention"


def _bind_when_loaded() -> None:
    """Have runners tell what they run before they plan their first batch, once per process."""
    make = GPUModelRunner.initialize_metadata_builders

    @functools.wraps(make)
    def bound(self: Any, *args: Any, **kwargs: Any) -> None:
        if (served := served_in(self.vllm_config)) is not None:
            served.bind(self)
        make(self, *args, **kwargs)

    GPUModelRunner.initialize_metadata_builders = bound


_bind_when_loaded()


class Plan(NamedTuple):
    """What is computed how in a pass of a batch with prompts.

    Attributes:
        batch: Its requests.
        dense: Where tokens are that vLLM computes, and its own metadata for them.
    """

    batch: Batch
    dense: list[tuple[slice, Any]]


class SparseBuilder:
    """Adds a plan to the metadata of a batch with prompts; goes before a builder of vLLM's."""

    vllm_config: Any
    layer_names: list[str]
    # Metadata that is copied to another group's pages would bring a plan of these.
    supports_update_block_table = False

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Return the batch's metadata."""
        build: Any = super().build  # type: ignore[misc]
        made = build(common_prefix_len, common_attn_metadata, fast_build)
        served = served_in(self.vllm_config)
        if served is None or not any(name in served.layers for name in self.layer_names):
            return made
        batch = served.look(common_attn_metadata)
        if batch is not None:
            others = [UBatchSlice(*one) for one in batch.others()]
            parts = split_attn_metadata(others, common_attn_metadata)
            # Fast, since otherwise FlashAttention plans all parts in one buffer, that of the whole batch.
            metadata = [build(0, part, True) for part in parts]
            places = [other.token_slice for other in others]
            setattr(made, PLAN, Plan(batch, list(zip(places, metadata, strict=True))))
        return made


class SparseImpl:
    """Computes prompts by their plan, all else as vLLM does; goes before an implementation of vLLM's."""

    scale: float
    sinks: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        settings = Settings.of(config)
        #: vLLM's layers by name, those of summaries among them.
        self.context = config.compilation_config.static_forward_context
        # vLLM makes modules on the GPU, where angles come out otherwise than in the attached model.
        with torch.device("cpu"):
            self.served = None if settings is None else served_in(config) or Served(config, settings)

    def process_weights_after_loading(self, act_dtype: Any) -> None:
        """Add pages for summaries of this layer, before vLLM plans its cache."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if self.served is None or self.served.settings.summaries != "kept":
            return
        name = next(name for name, layer in self.context.items() if getattr(layer, "impl", None) is self)
        # Weights may be loaded again, when there are pages.
        index = self.served.index_of(name)
        gate = None if index is None else self.served.gates.get(index)
        if gate is not None and name + SUFFIX not in self.context:
            self.context[name + SUFFIX] = SummaryPages(gate)

    def cached(self, layer: Any, kv_cache: Tensor, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return a request's first keys and values, ``[1, Hk, T, D]`` each.

        Args:
            layer: vLLM's layer.
            kv_cache: Its pages.
            pages: int ``[N]``, the request's.
            tokens: How many.
        """
        raise NotImplementedError

    def kept(self, name: str, row: int) -> Paged | None:
        """Return the summaries of a row's keys in a layer, None if they are not kept."""
        if (pages := self.context.get(name + SUFFIX)) is None:
            return None
        every: Any = get_forward_context().attn_metadata
        found: SummaryTable = every[name + SUFFIX]
        return Paged(pages.kv_cache, found.table[row].long(), found.stale[row], pages.page_tokens)

    def softcap(self) -> float | None:
        """Return the cap of scores, None if there is none."""
        return getattr(self, "logits_soft_cap", None) or None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *more: Any,
        **options: Any,
    ) -> Tensor:
        """Write the layer's output of all of a batch's tokens, ``[tokens, Hq, D]``, and return it."""
        forward: Any = super().forward  # type: ignore[misc]
        plan: Plan | None = getattr(attn_metadata, PLAN, None)
        served, name = self.served, layer.layer_name
        if plan is None or served is None or name not in served.layers:
            return forward(layer, query, key, value, kv_cache, attn_metadata, output, *more, **options)
        batch = plan.batch
        for tokens, metadata in plan.dense:
            new = (x[tokens] for x in (query, key, value))
            forward(layer, *new, kv_cache, metadata, output[tokens], *more, **options)
        if served.counts:
            count_tokens(served.layers[name], "dense", batch.dense_tokens)
        for row in sorted(batch.sparse):
            k, v = self.cached(layer, kv_cache, batch.table[row], batch.keys[row])
            q = query[batch.tokens[row]].transpose(0, 1)[None]
            asked = {"scale": self.scale, "softcap": self.softcap(), "sinks": self.sinks}
            out = served.attend(name, batch, row, q, k, v, self.kept(name, row), **asked)
            output[batch.tokens[row]] = out[0].transpose(0, 1)
        return output
