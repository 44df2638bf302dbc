"""What chooses blocks in an engine: gates and a policy that fit the model that it is configured for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from seerattention.engine.layer import Phase, SparseLayer
from seerattention.hosts.transformers.checkpoint import load_gates
from seerattention.hosts.transformers.choice import checked
from seerattention.hosts.transformers.family import attention_layers
from seerattention.hosts.transformers.rotary import Unrotate
from seerattention.hosts.vllm.settings import Settings
from seerattention.hosts.vllm.support import GROUPS, PAGES


def skeleton(model_config: Any) -> PreTrainedModel:
    """Return transformers' model of an engine's configuration, its weights neither loaded nor made.

    Those of attention layers are looked at where the model's folder has them, so that gates can tell them.

    Args:
        model_config: vLLM's configuration of the model.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config.hf_text_config)
    model.config._name_or_path = model_config.model
    wanted = {
        f"layers.{index}.self_attn.{name}": (attention, name)
        for index, attention in attention_layers(model).items()
        for name, _ in attention.named_parameters()
    }
    for file in sorted(Path(model_config.model).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118, it is no mapping
                if (suffix := key[key.find("layers.") :]) in wanted:
                    attention, name = wanted[suffix]
                    owner, _, last = name.rpartition(".")
                    value = nn.Parameter(weights.get_tensor(key), requires_grad=False)
                    setattr(attention.get_submodule(owner), last, value)
    return model


def choice_of(config: Any, settings: Settings) -> SparseLayer:
    """Return what an engine's layers are to be computed by, for all heads.

    Args:
        config: vLLM's configuration of the engine.
        settings: The engine's settings.

    Raises:
        FileNotFoundError: If there are no gates.
        NotImplementedError: If the model's family has no file, what it caches cannot be rotated back, or
            pages or processes do not hold what a gate needs.
        ValueError: If gates or policy do not fit.
    """
    model = skeleton(config.model_config)
    gates = load_gates(settings.gates)
    chosen = checked(model, gates, None, settings.policy, "dense", settings.check_base)
    unrotate = Unrotate(model)
    if unrotate.why_not is not None:
        raise NotImplementedError(f"keys in vLLM's pages cannot be rotated back: {unrotate.why_not}")
    size, heads = config.parallel_config.tensor_parallel_size, gates.config.num_kv_heads
    if gates.config.per_kv_head and size > heads:
        raise NotImplementedError(GROUPS.format(size=size, heads=heads))
    page, block = config.cache_config.block_size, gates.config.block_size
    if settings.summaries == "kept" and page % block:
        raise NotImplementedError(PAGES.format(page=page, block=block))
    prefill = Phase(dict(gates.requires_grad_(False).items()), chosen.policy, gates.reach)
    return SparseLayer(prefill, Phase({}, None), unrotate, settings.backend, settings.min_tokens)
