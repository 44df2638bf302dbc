"""Tensor parallelism of transformers': which of a model's heads a process computes, and whole weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from seerattention.gate import AttnGate
from seerattention.hosts.transformers.family import attention_layers
from seerattention.hosts.transformers.support import SPLIT_HEADS, SPLIT_LEARNING, SPLIT_PLAN
from seerattention.parallel.heads import gate_of, policy_of
from seerattention.policies import Policy

#: What a plan does to projections whose outputs are a process's own heads.
_OWN = {(f"{name}_proj", "colwise") for name in "qkv"}

#: What it does to those whose outputs are all heads, on every process.
_ALL = (None, "colwise_gather_output", "colwise_rep")


@dataclass(frozen=True)
class HeadShare:
    """Which heads of every layer a process computes.

    Attributes:
        rank: The process.
        size: How many share the heads, one after the other; with one, every process has all.
    """

    rank: int = 0
    size: int = 1

    def gate(self, gate: AttnGate) -> AttnGate:
        """Return the gate of these heads, itself where they are all."""
        return gate if self.size == 1 else gate_of(gate, self.rank, self.size)

    def policy(self, policy: Policy | None) -> Policy | None:
        """Return the policy of these heads."""
        return policy if policy is None or self.size == 1 else policy_of(policy, self.rank, self.size)


def processes(model: PreTrainedModel) -> int:
    """Return over how many processes transformers spread a model's weights, by tensor parallelism."""
    # Not `tp_size`, which 5.16 does not set.
    config = getattr(model.config, "distributed_config", None)
    return 1 if config is None or model._device_mesh is None else config.tp_size


def head_share(model: PreTrainedModel) -> HeadShare:
    """Return which heads this process computes.

    Raises:
        NotImplementedError: If the processes do not have whole heads in order.
    """
    if (size := processes(model)) == 1:
        return HeadShare()
    plan, names = model.tp_plan or {}, {module: name for name, module in model.named_modules()}
    found = {
        (child, plan.get(re.sub(r"\.\d+(?=\.)", ".*", f"{names[attention]}.{child}")))
        for attention in attention_layers(model).values()
        for child, _ in attention.named_children()
        if child.endswith("_proj") and child != "o_proj"
    }
    if all(style in _ALL for _, style in found):
        return HeadShare()
    if found != _OWN:
        styles = ", ".join(f"{child}: {style}" for child, style in sorted(found, key=str))
        raise NotImplementedError(f"this model's tensor parallel plan has {styles}; {SPLIT_PLAN}")
    config = model.config.get_text_config()
    q, kv = config.num_attention_heads, config.num_key_value_heads
    if q % size or kv % size:
        raise NotImplementedError(f"{size} processes share {q} query heads and {kv} KV heads; {SPLIT_HEADS}")
    mesh: Any = model._device_mesh
    return HeadShare(mesh.get_local_rank("tp" if "tp" in (mesh.mesh_dim_names or ()) else None), size)


def refuse_learning(model: PreTrainedModel) -> None:
    """Refuse models that are spread over processes where all of their heads are needed.

    Raises:
        NotImplementedError: If this one is.
    """
    if processes(model) > 1:
        raise NotImplementedError(SPLIT_LEARNING)


def whole_weight(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """Return a model's weight of this name in one piece; all processes that share it must ask together."""
    if (size := processes(model)) == 1:
        return weight
    # Torch can put it together too, but not what 5.15 made, which are plain tensors.
    from transformers.integrations.tensor_parallel import gather_state_dict_for_save

    return gather_state_dict_for_save({name: weight}, model.tp_plan, model._device_mesh, size)[name]
