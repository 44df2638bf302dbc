"""What identifies a base model, and where its weights are: on one device, several, or loaded when needed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from seerattention.hosts.transformers.family import attention_layers
from seerattention.hosts.transformers.tensor_parallel import whole_weight

#: What gates in use are called among an attention module's children.
GATES = ("attn_gate", "decode_gate")

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
            in float32, in float32 and bfloat16. Adapters such as LoRA do not change it. Empty where
            nothing but a name is known: of published gates, and of models that are or were quantised.
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
        """Describe a model; one that is spread over processes, in all of them at once."""
        model = unwrapped(model)
        config = model.config.get_text_config()
        return cls(
            name=str(model.config._name_or_path),
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
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


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model inside what PEFT, `torch.compile`, DDP, FSDP or Accelerate make of it."""
    while True:
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, PreTrainedModel):
            return model
        elif isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
            model = inner
        else:
            return model


def _last_part(name: str) -> str:
    """Return the last part of a hub id or a folder; for a folder in the hub's cache, of its hub id."""
    if cached := re.search(r"models--(?:[^/\\]+--)?([^/\\]+)[/\\]snapshots[/\\]", name):
        return cached[1]
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the dimension of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes, also where accelerate loads its weights when they are needed."""
    for part in module.modules():
        for _, tensor in _tensors(part):
            if not tensor.is_meta:
                return tensor.device
            if (device := getattr(getattr(part, "_hf_hook", None), "execution_device", None)) is not None:
                return torch.device(device)
    return torch.device("cpu")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over a module's own parameters and buffers by name: quantised weights may be either."""
    return chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))


def _loaded(module: nn.Module) -> AbstractContextManager[Any]:
    """Bring offloaded weights to the CPU for a while."""
    if not hasattr(module, "_hf_hook") or not any(x.is_meta for _, x in _tensors(module)):
        return nullcontext()
    # Whoever offloads has accelerate; nobody else needs it.
    from accelerate.utils import align_module_device

    return align_module_device(module, torch.device("cpu"))


def _base_weights(model: PreTrainedModel, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Iterate over the weights of a model's module by name: without gates, under adapters as if without.

    Weights that tensor parallelism splits are put together, by all processes.
    """
    module = model.get_submodule(where)
    # An adapter such as LoRA wraps a layer and keeps it as `base_layer`.
    adapted = [f"{name}." for name, part in module.named_modules() if hasattr(part, "base_layer")]
    own = []
    for prefix, part in module.named_modules():
        for name, _ in _tensors(part):
            # Those are no weights: tables of angles, say, which a forward pass may replace.
            if name in part._non_persistent_buffers_set:
                continue
            path = f"{prefix}.{name}".removeprefix(".")
            around = next((one for one in adapted if path.startswith(one)), "")
            inner = path.removeprefix(around)
            if any(f"{gate}." in path for gate in GATES) or (around and not inner.startswith("base_layer.")):
                continue
            own.append((around + inner.removeprefix("base_layer.") if around else path, part, name))
    for path, part, name in sorted(own, key=lambda entry: entry[0]):
        with _loaded(part):
            yield path, whole_weight(model, f"{where}.{path}".removeprefix("."), getattr(part, name).detach())


# Spread weights cannot be detached in inference mode.
@torch.inference_mode(mode=False)
def fingerprint(model: PreTrainedModel) -> str:
    """Return a cheap fingerprint of attention weights (see `BaseInfo`), "" of quantised or missing ones."""
    if hasattr(model, "is_quantized"):
        # False where transformers read quantised weights, GGUF among them, and made numbers of them again.
        return ""
    digest, known = hashlib.sha256(), False
    names = {module: name for name, module in model.named_modules()}
    for index, attention in attention_layers(model).items():
        for name, weight in _base_weights(model, names[attention]):
            plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype.is_floating_point
            if not plain or weight.element_size() == 1 or weight.is_meta:
                return ""
            known |= weight.dim() > 1
            flat = weight.flatten()
            sample = flat[_spread(flat.numel(), FINGERPRINT_SAMPLES).to(flat.device)].to(torch.bfloat16)
            sample = torch.where(sample.abs() < FINGERPRINT_LEAST, torch.zeros_like(sample), sample)
            digest.update(f"{index}.{name}{tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    # Norms alone, where projections keep their weights out of what is saved, tell no models apart.
    return digest.hexdigest()[:16] if known else ""


def _spread(size: int, count: int) -> Tensor:
    """Return ``count`` indices from first to last of ``size``; float32 would round past the end."""
    count = min(count, size)
    return torch.arange(count) * (size - 1) // max(count - 1, 1)


@torch.inference_mode(mode=False)
def base_checksum(model: PreTrainedModel) -> str:
    """Return the SHA-256 of every weight of the base model, gates left out.

    A model that is spread over processes is asked for in all of them at once.
    """
    digest = hashlib.sha256()
    for name, weight in _base_weights(unwrapped(model)):
        # A sharded weight is put together first, by all processes.
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        digest.update(name.encode())
        digest.update(weight.flatten().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
