"""One engine's process: which of a batch's requests are prompts to compute sparsely, and how."""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.rotary_embedding import (
    base,
    linear_scaling_rope,
    llama3_rope,
    yarn_scaling_rope,
)
from vllm.model_executor.models.utils import extract_layer_index

from seerattention.engine.call import Given
from seerattention.engine.layer import Observer, Phase, SparseLayer
from seerattention.engine.requests import attend_request
from seerattention.hosts.transformers.rotary import Unrotate
from seerattention.hosts.vllm.choice import choice_of, skeleton
from seerattention.hosts.vllm.settings import Settings
from seerattention.hosts.vllm.shard import gate_of, policy_of

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
        modules: vLLM's rotary module of every layer that rotates.
    """

    def __init__(self, model: PreTrainedModel, modules: dict[int, nn.Module]) -> None:
        super().__init__(model)
        self.modules = modules

    def angles(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of a layer's rotation to positions int64 ``[B, T]``, ``[B, T, D]`` each."""
        module: Any = self.modules[layer]
        both = module.cos_sin_cache[positions].to(torch.promote_types(module.dtype, torch.float32))
        still = (module.head_size - module.rotary_dim) // 2
        cos, sin = both.chunk(2, -1)
        cos, sin = nn.functional.pad(cos, (0, still), value=1.0), nn.functional.pad(sin, (0, still))
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


@dataclass(frozen=True)
class Request:
    """New tokens of a prompt in a batch.

    Attributes:
        row: Of the batch.
        tokens: Where they are among the batch's.
        keys: Tokens of the request so far, these included.
        prompt: Tokens of the whole prompt.
    """

    row: int
    tokens: slice
    keys: int
    prompt: int


@dataclass(frozen=True)
class Plan:
    """What is computed how in one pass of a batch with prompts.

    Attributes:
        sparse: The requests whose tokens choose.
        dense: Of the rest, neighbours together: the batch's rows, and their tokens.
        table: int32 ``[rows, pages]``, vLLM's block table.
    """

    sparse: list[Request]
    dense: list[tuple[slice, slice]]
    table: Tensor
    metadata: list[Any] = field(default_factory=list)


class Served:
    """The gates of a process's heads and layers, and the requests that they choose for.

    Args:
        config: vLLM's configuration of the engine.
        settings: The engine's settings.
    """

    def __init__(self, config: Any, settings: Settings) -> None:
        self.config, self.settings = config, settings
        whole = choice_of(config, settings)
        rank, size = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
        policy = whole.prefill.policy
        assert policy is not None
        gate = next(iter(whole.prefill.scorers.values()))
        scorers = {layer: gate_of(gate, rank, size) for layer, gate in whole.prefill.scorers.items()}
        prefill = Phase(scorers, policy_of(policy, gate, rank, size), whole.prefill.reach)
        self.layer: SparseLayer = replace(whole, prefill=prefill, observe=self._observed)
        #: Called as `SparseLayer.observe` is.
        self.observe: Observer | None = None
        #: Layer index of vLLM's attention layers that are served here.
        self.layers: dict[str, int] = {}

    def _observed(self, *seen: Any) -> None:
        if self.observe is not None:
            self.observe(*seen)

    def bind(self, runner: Any) -> None:
        """Find what is served in a runner's model, once it is loaded.

        Raises:
            NotImplementedError: If a layer rotates in a way that no table says.
        """
        self.runner = ref(runner)
        modules, rotary = dict(runner.get_model().named_modules()), {}
        unrotate = self.layer.unrotate
        assert isinstance(unrotate, Unrotate)
        for name in self.config.compilation_config.static_forward_context:
            if name not in modules or (index := extract_layer_index(name)) not in self.layer.prefill.scorers:
                continue
            self.layers[name] = index
            if unrotate.rotates is not None and not unrotate.rotates(unrotate.config, index):
                continue
            found = getattr(modules[name.rpartition(".")[0]], "rotary_emb", None)
            if type(found) not in TABLES:
                raise NotImplementedError(
                    f"{name} rotates by {type(found).__name__}, which seerattention cannot undo; known are "
                    f"{', '.join(kind.__name__ for kind in TABLES)}"
                )
            rotary[index] = found
        unrotate = UnrotateByTable(skeleton(self.config.model_config), rotary)
        self.layer = replace(self.layer, unrotate=unrotate)
        for gate in self.layer.prefill.scorers.values():
            gate.to(runner.device)

    def plan(self, batch: Any) -> Plan | None:
        """Say what of a batch is computed how, None if it holds no prompts.

        Args:
            batch: vLLM's common metadata of attention in a batch.
        """
        runner = self.runner()
        assert runner is not None
        starts, rows = batch.query_start_loc_cpu.tolist(), batch.num_reqs
        keys = batch.seq_lens_cpu_upper_bound.tolist()
        prompts = runner.input_batch.num_prompt_tokens[:rows].tolist()
        past = [keys[row] - (starts[row + 1] - starts[row]) for row in range(rows)]
        reading = [row for row in range(rows) if past[row] < min(prompts[row], keys[row])]
        if not reading:
            return None
        device = batch.block_table_tensor.device
        sparse = {row for row in reading if self.layer.why_dense(prompts[row], device) is None}
        dense = []
        for chosen, some in groupby(range(rows), lambda row: row in sparse):
            neighbours = list(some)
            if not chosen:
                first, last = neighbours[0], neighbours[-1] + 1
                if starts[last] > starts[first]:
                    dense.append((slice(first, last), slice(starts[first], starts[last])))
        requests = [
            Request(row, slice(starts[row], starts[row + 1]), keys[row], prompts[row])
            for row in sorted(sparse)
        ]
        return Plan(requests, dense, batch.block_table_tensor)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, request: Request, **options: Any) -> Tensor:
        """Compute a layer for a prompt's new tokens.

        Args:
            layer: Layer index.
            q: ``[1, Hq, Tq, D]``.
            k: ``[1, Hk, Tk, D]``, the earlier tokens' keys too.
            v: ``[1, Hk, Tk, D]``.
            request: The request.
            options: For `AttentionCall`, e.g. ``scale``.

        Returns:
            ``[1, Hq, Tq, D]``.
        """
        past = request.keys - q.shape[2]
        positions = torch.arange(past, request.keys, device=q.device)[None]
        before = (self.layer.unrotate(layer, x, positions) for x in (q, k[:, :, past:]))
        given = Given(q, k, v, *before)
        return attend_request(self.layer, layer, given, request.prompt, positions=positions, **options)
