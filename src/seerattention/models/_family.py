"""Model families: which attention layers take gates, and where q and k appear before RoPE."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

_PACKAGE = "seerattention.models"


class Family(Protocol):
    """What a family's file defines."""

    def taps(self, attention: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the modules whose outputs are q and k before the rotary embedding.

        Outputs are ``[B, T, H * D]`` or ``[B, T, H, D]``.
        """
        ...


def families() -> list[str]:
    """Return the model types that have a file in this package's path."""
    found = pkgutil.iter_modules(sys.modules[_PACKAGE].__path__)
    return sorted(m.name for m in found if not m.name.startswith("_"))


def family_of(model: PreTrainedModel) -> Family:
    """Return the family file of a model.

    Raises:
        NotImplementedError: If there is none for its ``model_type``.
    """
    model_type = model.config.get_text_config().model_type
    if model_type not in families():
        raise NotImplementedError(
            f"model type {model_type!r} has no family file; supported are {', '.join(families())}. "
            f"To add it, write models/{model_type}.py (see CONTRIBUTING.md)"
        )
    return importlib.import_module(f"{_PACKAGE}.{model_type}")  # type: ignore[return-value]


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the model's self-attention modules by layer index."""
    layers = {
        module.layer_idx: module
        for name, module in model.named_modules()
        if name.endswith("self_attn") and isinstance(getattr(module, "layer_idx", None), int)
    }
    return dict(sorted(layers.items()))  # type: ignore[arg-type]


def full_attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the self-attention modules that see the whole sequence; sliding windows stay as they are.

    Raises:
        ValueError: If there is none.
        NotImplementedError: If a layer is neither.
    """
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)

    def full(index: int) -> bool:
        if types is not None:
            return types[index] == "full_attention"
        return getattr(config, "sliding_window", None) is None

    if other := sorted(set(types or ()) - {"full_attention", "sliding_attention"}):
        raise NotImplementedError(
            f"layers of type {', '.join(other)} are not supported; layers must be full_attention or "
            "sliding_attention"
        )
    layers = {i: m for i, m in attention_layers(model).items() if full(i)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no full-attention layer (sliding_window={config.sliding_window}), "
            "so there is nothing to make sparse; use a model or a config with sliding_window=None"
        )
    return layers
