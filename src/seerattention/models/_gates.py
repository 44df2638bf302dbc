"""A model's gates, and what identifies the base model they were made for."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from seerattention.gate import AttnGate, GateConfig, Rotary
from seerattention.models._family import attention_layers, family_of, full_attention_layers

#: Key of a gate's parameter in a file: layer and the parameter's name.
KEY = "model.layers.{}.self_attn.attn_gate.{}"

#: Values per parameter that go into the fingerprint.
FINGERPRINT_SAMPLES = 256

#: Smaller values count as zero: float16 has not enough bits left for them to round like bfloat16.
FINGERPRINT_LEAST = 2.0**-16


@dataclass(frozen=True)
class BaseInfo:
    """Which model a set of gates belongs to.

    Attributes:
        name: Hub id or folder it was loaded from.
        model_type: transformers' family name.
        num_layers: Hidden layers.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Dimension of a head.
        fingerprint: SHA-256 over samples of the attention weights, rounded so that a model stored in
            bfloat16 or float16 has the same fingerprint whatever precision it is loaded in; one stored
            in float32, in float32 and bfloat16. Empty where nothing but a name is known, as of published
            gates.
    """

    name: str
    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    fingerprint: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> BaseInfo:
        """Describe a model."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            name=str(model.config._name_or_path),
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim_of(config),
            fingerprint=fingerprint(model),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain JSON types."""
        return asdict(self)

    def differences(self, other: BaseInfo, *, identity: bool = True) -> list[str]:
        """Return what differs from ``other`` that gates depend on, one phrase each.

        Args:
            other: The model at hand.
            identity: Compare the weights too or, where a fingerprint is not known, the last parts of
                the names; without, the shapes alone.
        """
        shape = ("model_type", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        found = [
            f"{field} is {getattr(other, field)}, not {getattr(self, field)}"
            for field in shape
            if getattr(self, field) != getattr(other, field)
        ]
        if found or not identity:
            return found
        if self.fingerprint and other.fingerprint:
            same = self.fingerprint == other.fingerprint
            return [] if same else ["its attention weights differ (fingerprint)"]
        mine, others = _last_part(self.name), _last_part(other.name)
        if mine and others and mine.casefold() != others.casefold():
            return [f"its name is {others}, not {mine}, and nothing but the name is known"]
        return []


def _last_part(name: str) -> str:
    """Return the last part of a hub id or a folder; for a folder in the hub's cache, of its hub id."""
    if cached := re.search(r"models--(?:[^/\\]+--)?([^/\\]+)[/\\]snapshots[/\\]", name):
        return cached[1]
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the dimension of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _base_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in sorted(module.named_parameters()):
        if "attn_gate." not in name:
            yield name, parameter.detach()


def fingerprint(model: PreTrainedModel) -> str:
    """Return a cheap fingerprint of the attention weights (see `BaseInfo`)."""
    digest = hashlib.sha256()
    for index, attention in attention_layers(model).items():
        for name, parameter in _base_parameters(attention):
            flat = parameter.flatten()
            sample = flat[_spread(flat.numel(), FINGERPRINT_SAMPLES).to(flat.device)].to(torch.bfloat16)
            sample = torch.where(sample.abs() < FINGERPRINT_LEAST, torch.zeros_like(sample), sample)
            digest.update(f"{index}.{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _spread(size: int, count: int) -> Tensor:
    """Return ``count`` indices from first to last of ``size``; float32 would round past the end."""
    count = min(count, size)
    return torch.arange(count) * (size - 1) // max(count - 1, 1)


def base_checksum(model: PreTrainedModel) -> str:
    """Return the SHA-256 of every weight of the base model, gates left out."""
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model):
        # A sharded weight is put together first, by all processes.
        parameter = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(name.encode())
        digest.update(parameter.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def check_weights(file: Path, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights whose keys or shapes are not exactly those expected.

    Args:
        file: Where they were read, for the message.
        weights: Tensors by key.
        shapes: The shape of every key that must be there.

    Raises:
        ValueError: If a key is missing, extra or misshapen.
    """
    for what, keys in (("missing", set(shapes) - set(weights)), ("extra", set(weights) - set(shapes))):
        if keys:
            raise ValueError(
                f"{file} has {len(keys)} {what} gate keys, the first is {min(keys)}; "
                "save or download the gates again"
            )
    for key, shape in shapes.items():
        if tuple(weights[key].shape) != tuple(shape):
            raise ValueError(
                f"{key} in {file} is {list(weights[key].shape)}, its configuration needs {list(shape)}; "
                "save or download the gates again"
            )


class Gates(nn.Module):
    """One gate per full-attention layer, all of one configuration.

    Args:
        config: The gates' design.
        base: The model they belong to.
        layers: Layer indices that have a gate.
        policy: Text form of the policy they were saved with, if any.
    """

    def __init__(
        self, config: GateConfig, base: BaseInfo, layers: list[int], policy: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.base = base
        self.policy = policy
        self.layers = nn.ModuleDict({str(i): AttnGate(config) for i in layers})

    def items(self) -> Iterator[tuple[int, AttnGate]]:
        """Iterate over (layer index, gate)."""
        for index, gate in self.layers.items():
            assert isinstance(gate, AttnGate)
            yield int(index), gate

    def use_rotary_of(self, model: PreTrainedModel) -> None:
        """Let every gate rotate as its layer does, by the model's own rotary code, RoPE scaling included."""
        if not self.config.rope:
            return
        family, config = family_of(model), model.config.get_text_config()
        rotary = model_rotary(model, self.config.dim)
        for index, gate in self.items():
            turns = not hasattr(family, "rotates") or family.rotates(config, index)
            gate.use_rotary(rotary if turns else _no_rotation(self.config.dim))


def new_gates(model: PreTrainedModel, **settings: Any) -> Gates:
    """Make untrained gates for a model.

    Args:
        model: The base model.
        settings: Fields of `GateConfig` other than the model's shape.

    Returns:
        Gates in fp32 on the model's device, for every layer with full attention.

    Raises:
        NotImplementedError: If the model's family has no file.
        ValueError: If a setting does not fit, or no layer has full attention.
    """
    family_of(model)
    layers = list(full_attention_layers(model))
    base = BaseInfo.of(model)
    shape = {"num_heads": base.num_heads, "num_kv_heads": base.num_kv_heads, "head_dim": base.head_dim}
    gates = Gates(GateConfig.from_dict({**shape, **settings}), base, layers)
    gates.use_rotary_of(model)
    return gates.to(model.device)


def _no_rotation(dim: int) -> Rotary:
    """Return angles of zero, for the gates of layers without a rotary embedding."""

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos = torch.ones(*positions.shape, dim, device=positions.device)
        return cos, torch.zeros_like(cos)

    return rotary


def _rotary_module(model: PreTrainedModel) -> nn.Module | None:
    # A vision tower of the same model may have one of its own.
    modules = model.get_decoder().named_modules()
    return next((m for n, m in modules if n.endswith("rotary_emb")), None)


def _kind_of_layer(rotary: nn.Module) -> tuple[str, ...]:
    """Return what a rotary module with frequencies per kind of layer must be told: the kind with gates."""
    return () if hasattr(rotary, "inv_freq") else ("full_attention",)


def _frequencies(rotary: nn.Module) -> int:
    """Return how many pairs of values a rotary module turns."""
    return rotary.get_buffer("_".join((*_kind_of_layer(rotary), "inv_freq"))).shape[-1]


def head_order(model: PreTrainedModel) -> Tensor | None:
    """Return the order of a head's values in which gates see q and k (`Family.order`), or None for as is."""
    family, rotary = family_of(model), _rotary_module(model)
    if rotary is None or not hasattr(family, "order"):
        return None
    head_dim = head_dim_of(model.config.get_text_config())
    order = family.order(head_dim, 2 * _frequencies(rotary))
    return None if order == list(range(head_dim)) else torch.tensor(order)


def model_rotary(model: PreTrainedModel, dim: int) -> Rotary:
    """Return the model's rotary code as a function of positions, for vectors of ``dim`` values.

    Where the model rotates only part of a head, the other values' angles are zero; `head_order` puts
    them where they belong.

    Raises:
        NotImplementedError: If the model has no rotary module, or rotates only part of a head and its
            family does not say which.
    """
    found = _rotary_module(model)
    if found is None:
        raise NotImplementedError(f"{type(model).__name__} has no rotary_emb; use GateConfig(rope=False)")
    config = model.config.get_text_config()
    if dim != head_dim_of(config):
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
            raise NotImplementedError(
                f"longrope has a factor for every pair of a head's values, so gate_dim must be "
                f"{head_dim_of(config)}, not {dim}; or use GateConfig(rope=False)"
            )
        narrower = copy.deepcopy(config)
        narrower.head_dim = dim
        found = type(found)(narrower).to(model.device)  # type: ignore[call-arg]
    turned = _frequencies(found)
    if 2 * turned != dim and not hasattr(family_of(model), "order"):
        raise NotImplementedError(
            f"{type(model).__name__} rotates {2 * turned} of {dim} values of a head, and its family's file "
            "defines no order() for that; use GateConfig(rope=False)"
        )

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        # Some modules return every angle twice, others once.
        cos, sin = (x[..., :turned] for x in found(like, positions, *_kind_of_layer(found)))
        still = dim // 2 - turned
        cos, sin = F.pad(cos, (0, still), value=1.0), F.pad(sin, (0, still))
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    return rotary
