"""Model families: which attention layers take gates, and where q and k appear before RoPE."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from seerattention.hosts.transformers import families as family_files


@dataclass(frozen=True)
class Tap:
    """Where q or k before the rotary embedding is in a module's output.

    Attributes:
        module: The module.
        columns: Their part of its last dimension, where it computes more; default all.
        heads_first: Whether the output is ``[B, H, T, D]``.
    """

    module: nn.Module
    columns: slice | None = None
    heads_first: bool = False


#: Finds the taps of q and k in an attention module; a plain module is a `Tap` on all of its output.
Taps = Callable[[nn.Module], tuple[nn.Module | Tap, nn.Module | Tap]]


def outputs(q: str, k: str, *, heads_first: bool = False) -> Taps:
    """Return the ``taps`` of families where the outputs of two modules are q and k before RoPE.

    Args:
        q: Name of the attention's module whose output is q.
        k: Name of the one whose output is k.
        heads_first: Whether these outputs are ``[B, H, T, D]``.
    """
    return functools.partial(_outputs, (q, k), heads_first)


# A function of the module, since attached models are pickled with it.
def _outputs(names: tuple[str, str], heads_first: bool, attention: nn.Module) -> tuple[Tap, Tap]:
    q, k = (Tap(attention.get_submodule(name), heads_first=heads_first) for name in names)
    return q, k


class Family(Protocol):
    """What a family's file defines.

    Only ``taps`` is needed. A file without it says, by ``unsupported``, why a family is refused.
    """

    def taps(self, attention: nn.Module) -> tuple[nn.Module | Tap, nn.Module | Tap]:
        """Return where q and k before the rotary embedding are.

        A module's output is ``[B, T, H * D]`` or ``[B, T, H, D]``; `Tap` describes others.
        """
        ...

    def unsupported(self, config: PreTrainedConfig) -> str | None:
        """Return why models of this configuration are refused, in a few words; default None, they are not.

        The configuration is the whole model's, of which the text model's may be a part.
        """
        ...

    def rotates(self, config: PreTrainedConfig, layer: int) -> bool:
        """Whether a layer applies the rotary embedding, so that its gate does too; default True."""
        ...

    def order(self, head_dim: int, rotated: int) -> list[int]:
        """Order a head's values such that the model rotates value ``i`` with value ``i + head_dim / 2``.

        Gates rotate that way. Defined by families which rotate only the first ``rotated`` values of a
        head, or other pairs of values; see `halves`. Default: the model rotates as gates do.
        """
        ...


def halves(head_dim: int, rotated: int, *, interleaved: bool = False) -> list[int]:
    """Return the order of a head's values for models that rotate its first ``rotated`` values.

    Args:
        head_dim: Values of a head.
        rotated: How many of them are rotated.
        interleaved: Whether the model rotates neighbours, not value ``i`` with ``i + rotated / 2``.
    """
    if interleaved:
        first, second = range(0, rotated, 2), range(1, rotated, 2)
    else:
        first, second = range(rotated // 2), range(rotated // 2, rotated)
    middle = (rotated + head_dim) // 2
    return [*first, *range(rotated, middle), *second, *range(middle, head_dim)]


def _files() -> dict[str, Any]:
    """Return the family files by model type."""
    found = pkgutil.iter_modules(family_files.__path__)
    names = sorted(m.name for m in found if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{family_files.__name__}.{name}") for name in names}


def families() -> list[str]:
    """Return the model types that are supported."""
    return [name for name, file in _files().items() if hasattr(file, "taps")]


def refused() -> dict[str, str]:
    """Return the model types whose file says only why they are not supported, with that reason."""
    without = {name: file for name, file in _files().items() if not hasattr(file, "taps")}
    return {name: file.unsupported(PreTrainedConfig()) for name, file in without.items()}


def family_of(model: PreTrainedModel) -> Family:
    """Return the family file of a model.

    Raises:
        NotImplementedError: If there is none for its ``model_type``, or it refuses the model.
        TypeError: If it is no model of transformers.
    """
    if not hasattr(model, "config"):
        raise TypeError(
            f"the model must be one of transformers, got a {type(model).__name__}; load it first, by "
            "AutoModelForCausalLM.from_pretrained"
        )
    model_type = model.config.get_text_config().model_type
    file = _files().get(model_type)
    if file is None:
        raise NotImplementedError(
            f"model type {model_type!r} has no family file; supported are {', '.join(families())}. "
            f"To add it, write families/{model_type}.py (see CONTRIBUTING.md)"
        )
    if hasattr(file, "unsupported") and (reason := file.unsupported(model.config)):
        raise NotImplementedError(f"{type(model).__name__} ({model_type}) is not supported: {reason}")
    return file


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the model's self-attention modules by layer index."""
    layers = {
        module.layer_idx: module
        for name, module in model.named_modules()
        if name.endswith("self_attn") and isinstance(getattr(module, "layer_idx", None), int)
    }
    return dict(sorted(layers.items()))  # type: ignore[arg-type]


def has_windows(config: PreTrainedConfig) -> bool:
    """Whether a text model of this configuration has sliding-window layers beside those of full attention."""
    return any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())


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
            f"{type(model).__name__} has no full-attention layer "
            f"(sliding_window={getattr(config, 'sliding_window', None)}), "
            "so there is nothing to make sparse; use a model or a config with sliding_window=None"
        )
    return layers
