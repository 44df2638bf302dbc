"""What chooses blocks in an engine: gates and a policy that fit the model that it is configured for."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from seerattention.engine.layer import Phase, SparseLayer
from seerattention.hosts.transformers.checkpoint import load_gates
from seerattention.hosts.transformers.choice import DENSE, checked
from seerattention.hosts.transformers.family import attention_layers, full_attention_layers
from seerattention.hosts.transformers.gates import Gates
from seerattention.hosts.transformers.rotary import Unrotate
from seerattention.hosts.vllm.settings import Settings
from seerattention.hosts.vllm.support import GROUPS, NO_POLICY, OFF, PAGES, SPLIT
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.rows import Rows
from seerattention.selection import BlockSelection

#: Where a checkpoint has the weights of a text model's attention: not those of other towers.
WEIGHT = re.compile(r"(?:(?:language_model|text_model|model)\.)*(layers\.\d+\.self_attn\..+)")


def skeleton(model_config: Any, *, weights: bool = False) -> PreTrainedModel:
    """Return transformers' model of an engine's configuration, its weights neither loaded nor made.

    Args:
        model_config: vLLM's configuration of the model.
        weights: Look at those of attention layers, where the model's folder has them, by which gates tell
            their model.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config.hf_text_config)
    model.config._name_or_path = model_config.model
    wanted = {
        f"layers.{index}.self_attn.{name}": (attention, name)
        for index, attention in attention_layers(model).items()
        for name, _ in attention.named_parameters()
    }
    for file in sorted(Path(model_config.model).glob("*.safetensors")) if weights else ():
        with safe_open(file, framework="pt") as held:
            for key in held.keys():  # noqa: SIM118, it is no mapping
                if (found := WEIGHT.fullmatch(key)) and found[1] in wanted:
                    attention, name = wanted[found[1]]
                    owner, _, last = name.rpartition(".")
                    value = nn.Parameter(held.get_tensor(key), requires_grad=False)
                    setattr(attention.get_submodule(owner), last, value)
    return model


def choice_of(config: Any, settings: Settings, *, check_base: bool) -> SparseLayer:
    """Return what an engine's layers are to be computed by, for all heads.

    Args:
        config: vLLM's configuration of the engine.
        settings: The engine's settings.
        check_base: Whether gates must be of the model's weights; who asks again need not look again.

    Raises:
        FileNotFoundError: If there are no gates.
        NotImplementedError: If the model's family has no file, what it caches cannot be rotated back, pages
            or processes do not hold what a gate needs, or the backend does not run here.
        ValueError: If gates or policy do not fit.
    """
    model = skeleton(config.model_config, weights=check_base)
    gates = load_gates(settings.gates)
    if settings.policy is None and gates.policy is None:
        raise ValueError(NO_POLICY)
    if settings.policy == DENSE:
        raise ValueError(OFF)
    chosen = checked(model, gates, None, settings.policy, DENSE, check_base)
    device = torch.device(config.device_config.device_type)
    # Who starts the process that computes leaves it the GPU.
    here = device.type == "cpu" or torch.cuda.is_initialized()
    if here:
        # Gates rotate by the model's own code, which copies its frequencies to where it is asked to.
        modules: dict[str, nn.Module] = dict(model.named_modules())
        for name in modules:
            if name.endswith("rotary_emb"):
                modules[name].to(device)
    unrotate = Unrotate(model)
    if unrotate.why_not is not None:
        raise NotImplementedError(f"keys in vLLM's pages cannot be rotated back: {unrotate.why_not}")
    size, heads = config.parallel_config.tensor_parallel_size, gates.config.num_kv_heads
    if gates.config.per_kv_head and size > heads:
        raise NotImplementedError(GROUPS.format(size=size, heads=heads))
    page, block = config.cache_config.block_size, gates.config.block_size
    if settings.summaries == "kept" and page % block:
        raise NotImplementedError(PAGES.format(page=page, block=block))
    layers = full_attention_layers(model)
    shared = gates.shared(layers)
    for begin in _begins(config):
        if (first := min((i for i in layers if i >= begin), default=None)) in shared:
            raise NotImplementedError(SPLIT.format(layer=first))
    prefill = Phase(dict(gates.requires_grad_(False).items()), chosen.policy, gates.reach, shared)
    layer = SparseLayer(prefill, Phase({}, None), unrotate, settings.backend, settings.min_tokens)
    if here:
        _try(layer, gates, config.model_config.dtype, device)
    return layer


def _begins(config: Any) -> list[int]:
    """Return the first layer of every process of a pipeline."""
    parallel = copy.copy(config.parallel_config)
    found = []
    for stage in range(parallel.pipeline_parallel_size):
        parallel.rank = stage * parallel.tensor_parallel_size
        found.append(config.model_config.get_layers_start_end_indices(parallel)[0])
    return found


def _try(layer: SparseLayer, gates: Gates, dtype: torch.dtype, device: torch.device) -> None:
    """Have the backend compute two blocks, or say why it does not run here."""
    c, tokens = gates.config, 2 * gates.config.block_size
    q, k = (
        torch.zeros(1, heads, tokens, c.head_dim, dtype=dtype, device=device)
        for heads in (c.num_heads, c.num_kv_heads)
    )
    everything = BlockSelection.full(Rows.last(tokens, tokens), (c.block_size, c.block_size), device)
    block_sparse_attention(q, k, k, everything, backend=layer.backend)
