"""One engine's process: which of a batch's requests are prompts to compute sparsely, and how."""

# pyright: reportMissingImports=false

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.rotary_embedding import (
    base,
    linear_scaling_rope,
    llama3_rope,
    yarn_scaling_rope,
)

from seerattention.engine.call import AttentionCall, Choices, Given
from seerattention.engine.layer import Observer, SparseLayer
from seerattention.engine.requests import attend_request
from seerattention.gate import AttnGate
from seerattention.hosts.transformers.rotary import Unrotate
from seerattention.hosts.vllm.choice import choice_of, skeleton
from seerattention.hosts.vllm.metrics import count_blocks, count_tokens
from seerattention.hosts.vllm.settings import Settings
from seerattention.hosts.vllm.summaries import Made, Paged
from seerattention.parallel.heads import gate_of, policy_of
from seerattention.selection import BlockSelection

# As one of vLLM's, which shows no others.
logger = init_logger("vllm.seerattention")

#: Rotary code of vLLM whose angles depend on the position alone, and whose table says them.
TABLES = (
    base.RotaryEmbedding,
    linear_scaling_rope.LinearScalingRotaryEmbedding,
    llama3_rope.Llama3RotaryEmbedding,
    yarn_scaling_rope.YaRNScalingRotaryEmbedding,
)


class UnrotateByTable(Unrotate):
    """Rotates keys and queries back by the numbers that vLLM rotated them by, rounded as they are.

    Args:
        model: A transformers model of the same configuration.
        attention: vLLM's attention module of every layer.

    Raises:
        NotImplementedError: If a layer rotates in a way that no table says.
    """

    def __init__(self, model: PreTrainedModel, attention: dict[int, nn.Module]) -> None:
        super().__init__(model)
        self.modules: dict[int, Any] = {}
        for layer, module in attention.items():
            if self.rotates is None or self.rotates(self.config, layer):
                found = self.modules[layer] = getattr(module, "rotary_emb", None)
                if type(found) not in TABLES:
                    raise NotImplementedError(
                        f"layer {layer} rotates by {type(found).__name__}, which seerattention cannot undo; "
                        f"known are {', '.join(kind.__name__ for kind in TABLES)}"
                    )

    def angles(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of a layer's rotation to positions int64 ``[B, T]``, ``[B, T, R]`` each."""
        return self.modules[layer].cos_sin_cache[positions].chunk(2, -1)


class Lengths(NamedTuple):
    """How long the requests of a pass are, row by row, in arrays that the host has.

    Attributes:
        edges: int ``[rows + 1]``, where each one's new tokens begin among the pass's, and the last ones end.
        keys: int ``[rows]``, tokens with them.
        prompts: int ``[rows]``, tokens of each one's whole prompt.
    """

    edges: np.ndarray
    keys: np.ndarray
    prompts: np.ndarray

    @property
    def past(self) -> np.ndarray:
        """Tokens before the new ones, int ``[rows]``."""
        return self.keys - np.diff(self.edges)

    @property
    def reading(self) -> np.ndarray:
        """Which rows have new tokens of their prompt, bool ``[rows]``."""
        return self.past < np.minimum(self.prompts, self.keys)


@dataclass(frozen=True)
class Batch:
    """The requests of a pass, row by row.

    Attributes:
        tokens: Where each one's new tokens are among the pass's.
        past: Tokens before them.
        keys: Tokens with them.
        prompts: Tokens of each one's whole prompt.
        reading: Rows with new tokens of their prompt.
        sparse: Of those, the rows whose prompts are to be sparse.
        table: int32 ``[rows, pages]``, vLLM's block table.
        chosen: What layers chose so far, by row and by where a part of it begins.
    """

    tokens: list[slice]
    past: list[int]
    keys: list[int]
    prompts: list[int]
    reading: set[int]
    sparse: set[int]
    table: Tensor
    chosen: defaultdict[int, dict[int, Choices]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def dense_tokens(self) -> int:
        """Tokens of prompts that are not to be sparse."""
        return sum(self.keys[row] - self.past[row] for row in self.reading - self.sparse)

    def others(self) -> Iterator[tuple[slice, slice]]:
        """Yield runs of rows that are not sparse, and where their tokens are, if they have some."""
        for sparse, some in groupby(range(len(self.tokens)), self.sparse.__contains__):
            rows = list(some)
            place = slice(self.tokens[rows[0]].start, self.tokens[rows[-1]].stop)
            if not sparse and place.stop > place.start:
                yield slice(rows[0], rows[-1] + 1), place


class Served:
    """The gates of a process's heads and layers, and the requests that they choose for.

    Args:
        config: vLLM's configuration of the engine.
        settings: The engine's settings.

    Attributes:
        gates: By layer; others read what the nearest before them chose.
        layer: Computes layers.
        layers: By the name of an attention layer of vLLM's, its index.
        observe: Called as `SparseLayer.observe` is, if there is one.
    """

    def __init__(self, config: Any, settings: Settings) -> None:
        self.config, self.settings = config, settings
        whole = choice_of(config, settings, check_base=False)
        rank, size = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
        gates = {layer: one for layer, one in whole.prefill.scorers.items() if isinstance(one, AttnGate)}
        policy = whole.prefill.policy
        assert policy is not None
        self.gates = {layer: gate_of(one, rank, size) for layer, one in gates.items()}
        prefill = replace(whole.prefill, scorers=self.gates, policy=policy_of(policy, rank, size))
        self.layer: SparseLayer = replace(whole, prefill=prefill, observe=self._observed)
        # Of the processes that share a layer's heads one counts its tokens.
        self.counts = rank == 0
        self.layers: dict[str, int] = {}
        self.observe: Observer | None = None

    def _observed(self, layer: int, call: AttentionCall, selection: BlockSelection) -> None:
        count_blocks(layer, call, selection)
        if self.observe is not None:
            self.observe(layer, call, selection)

    def index_of(self, name: str) -> int | None:
        """Return the layer index of an attention layer of vLLM's, None if no gate is for it."""
        found = re.search(r"(?:^|\.)layers\.(\d+)\.(?:self_)?attn\.attn$", name)
        index = None if found is None else int(found[1])
        return index if index in self.gates or index in self.layer.prefill.shared else None

    def bind(self, runner: Any) -> None:
        """Find what is served in a runner's model, once it is loaded.

        Raises:
            NotImplementedError: If a layer with a gate is not found, or rotates in a way that no table says.
        """
        self.runner = ref(runner)
        modules = dict(runner.get_model().named_modules())
        for name in self.config.compilation_config.static_forward_context:
            # A draft model's layers are in the context too.
            if name in modules and (index := self.index_of(name)) is not None:
                self.layers[name] = index
                if index in self.gates:
                    self.gates[index].to(runner.device)
        first, end = self.config.model_config.get_layers_start_end_indices(self.config.parallel_config)
        expected = {index for index in (*self.gates, *self.layer.prefill.shared) if first <= index < end}
        if sorted(self.layers.values()) != sorted(expected):
            raise NotImplementedError(
                f"layers {sorted(expected)} have gates, and vLLM's {type(runner.get_model()).__name__} has "
                f"{sorted(self.layers.values())} under names that seerattention knows"
            )
        least = self.settings.min_tokens
        if least is None:
            known = self.layer.crossovers.get(runner.device.type)
            least = 0 if known is None else known.dense_below
        logger.info(
            "Prompts of %s tokens and more are sparse in %s layers: gates %s, policy %s, summaries %s",
            f"{least:,}",
            len(self.layers),
            self.settings.gates,
            self.layer.prefill.policy,
            self.settings.summaries,
        )
        # Models that vLLM takes from transformers rotate by their own code.
        if not self.config.model_config.using_transformers_backend():
            parents = {index: modules[name.rpartition(".")[0]] for name, index in self.layers.items()}
            unrotate = UnrotateByTable(skeleton(self.config.model_config), parents)
            self.layer = replace(self.layer, unrotate=unrotate)

    def lengths(self, given: Any) -> Lengths:
        """Return how long the requests of a pass are.

        Args:
            given: vLLM's common metadata of attention in it.
        """
        runner, count = self.runner(), given.num_reqs
        assert runner is not None
        edges = given.query_start_loc_cpu[: count + 1].numpy()
        keys = given.seq_lens_cpu_upper_bound[:count].numpy()
        return Lengths(edges, keys, runner.input_batch.num_prompt_tokens[:count])

    def look(self, given: Any) -> Batch | None:
        """Look at the requests of a pass; None if all are decoded, as in most passes.

        Args:
            given: vLLM's common metadata of attention in it.
        """
        found = self.lengths(given)
        if not (reads := found.reading).any():
            return None
        tokens = [slice(*both) for both in pairwise(found.edges.tolist())]
        past, keys, prompts = found.past.tolist(), found.keys.tolist(), found.prompts.tolist()
        reading, table = set(reads.nonzero()[0].tolist()), given.block_table_tensor
        sparse = {row for row in reading if self.layer.why_dense(prompts[row], table.device) is None}
        return Batch(tokens, past, keys, prompts, reading, sparse, table)

    def attend(
        self,
        name: str,
        batch: Batch,
        row: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Paged | None,
        **options: Any,
    ) -> Tensor:
        """Compute a layer for a prompt's new tokens.

        Args:
            name: Of vLLM's attention layer.
            batch: The requests of the pass.
            row: Whose prompt it is.
            q: ``[1, Hq, Tq, D]``.
            k: ``[1, Hk, Tk, D]``, the earlier tokens' keys too.
            v: ``[1, Hk, Tk, D]``.
            kept: Its summaries, None where they are made anew.
            options: For `AttentionCall`, e.g. ``scale``.

        Returns:
            ``[1, Hq, Tq, D]``.
        """
        layer, tokens = self.layers[name], k.shape[2]
        past = tokens - q.shape[2]
        if self.counts:
            count_tokens(layer, "sparse", q.shape[2])
        positions = torch.arange(past, tokens, device=q.device)[None]
        before = (self.layer.unrotate(layer, x, positions) for x in (q, k[:, :, past:]))
        given = Given(q, k, v, *before)
        options |= {"summaries": kept or Made(), "positions": positions, "chosen": batch.chosen[row]}
        return attend_request(self.layer, layer, given, batch.prompts[row], **options)


def served_in(config: Any) -> Served | None:
    """Return what serves the layers of an engine in this process, None if it has no settings."""
    layers = config.compilation_config.static_forward_context.values()
    return next(filter(None, (getattr(getattr(one, "impl", None), "served", None) for one in layers)), None)
