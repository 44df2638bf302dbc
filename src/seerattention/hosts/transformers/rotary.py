"""The model's own rotary code: for gates, and to rotate cached keys back."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from seerattention.gate import LengthRotary, Rotary
from seerattention.hosts.transformers.base import head_dim_of
from seerattention.hosts.transformers.family import family_of, has_windows
from seerattention.hosts.transformers.request import LayerCall, running
from seerattention.hosts.transformers.support import LONGROPE
from seerattention.ops.rotate_back import rotate_back


def no_rotation(dim: int) -> Rotary:
    """Return angles of zero, for the gates of layers without a rotary embedding."""
    return functools.partial(_still, dim)


# Functions of the module: what gates rotate by is pickled with them.
def _still(dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos = torch.ones(*positions.shape, dim, device=positions.device)
    return cos, torch.zeros_like(cos)


def _rotary_module(model: PreTrainedModel) -> nn.Module:
    # A vision tower of the same model may have one of its own.
    for name, module in model.get_decoder().named_modules():
        if name.endswith("rotary_emb"):
            return module
    raise NotImplementedError(f"{type(model).__name__} has no rotary_emb; use GateConfig(rope=False)")


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of RoPE of the layers with gates, none of a model without it."""
    settings = getattr(config, "rope_parameters", None) or {}
    return settings.get("full_attention", settings)


def _kind_of_layer(rotary: nn.Module) -> tuple[str, ...]:
    """Return what a rotary module with frequencies per kind of layer must be told: the kind with gates."""
    return () if hasattr(rotary, "inv_freq") else ("full_attention",)


def by_length(config: PreTrainedConfig) -> str | None:
    """Return the kind of RoPE where its angles depend on the text's length, else None."""
    kind = _rope(config).get("rope_type")
    return kind if kind in ("dynamic", "longrope") else None


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model of this configuration has, None where it does not say.

    With YaRN that is the extended number also where ``max_position_embeddings`` is the one before: the
    settings name where it starts.
    """
    config = config.get_text_config()
    limit, rope = getattr(config, "max_position_embeddings", None), _rope(config)
    if limit is None or rope.get("rope_type") != "yarn":
        return limit
    return max(limit, int((rope.get("factor") or 1) * rope.get("original_max_position_embeddings", limit)))


def why_no_gaps(config: PreTrainedConfig) -> str | None:
    """Return why a model of this configuration cannot read positions with gaps as it reads long texts."""
    config = config.get_text_config()
    if (kind := by_length(config)) is not None:
        return f"RoPE of type {kind} turns a text by its length, which gaps would pretend"
    if has_windows(config):
        return "sliding windows count tokens, and across a gap would see distances that they never learned"
    return None


def _frequencies(rotary: nn.Module) -> int:
    """Return how many pairs of values a rotary module turns."""
    return rotary.get_buffer("_".join((*_kind_of_layer(rotary), "inv_freq"))).shape[-1]


def head_order(model: PreTrainedModel) -> Tensor | None:
    """Return the order of a head's values in which gates see q and k (`Family.order`), or None for as is."""
    family = family_of(model)
    if not hasattr(family, "order"):
        return None
    head_dim = head_dim_of(model.config.get_text_config())
    order = family.order(head_dim, 2 * _frequencies(_rotary_module(model)))
    return None if order == list(range(head_dim)) else torch.tensor(order)


def model_rotary(model: PreTrainedModel, dim: int, pairs: str = "slowest") -> Rotary:
    """Return the model's rotary code as a function of positions, for vectors of ``dim`` values.

    Where the model rotates only part of a head, the other values' angles are zero; `head_order` puts
    them where they belong. ``pairs`` says which rotations vectors shorter than a head get, see `GateConfig`.

    Raises:
        NotImplementedError: If the model has no rotary module, or rotates only part of a head and its
            family does not say which.
    """
    found = _rotary_module(model)
    config = model.config.get_text_config()
    width = head_dim_of(config) if pairs == "slowest" else dim
    if dim > width or width != head_dim_of(config):
        width = dim
        if by_length(config) == "longrope":
            raise NotImplementedError(
                f"longrope has a factor for every pair of a head's values, so gate_dim must be "
                f"{head_dim_of(config)}, not {dim}; or use GateConfig(rope_pairs='slowest')"
            )
        narrower = copy.deepcopy(config)
        narrower.head_dim = dim
        found = type(found)(narrower).to(model.device)  # type: ignore[call-arg]
    turned = _frequencies(found)
    if 2 * turned != width and not hasattr(family_of(model), "order"):
        raise NotImplementedError(
            f"{type(model).__name__} rotates {2 * turned} of {width} values of a head, and its family's file "
            "defines no order() for that; use GateConfig(rope=False)"
        )

    follows_length = by_length(config) is not None
    kind = LengthRotary if follows_length else functools.partial
    return kind(_turned, found, turned, width, dim, follows_length)


def _turned(
    found: nn.Module, turned: int, width: int, dim: int, follows_length: bool, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a rotary module's angles for the slowest of ``width`` values, of which it turns some pairs."""
    like, count = torch.empty(0, dtype=torch.float32, device=positions.device), positions.shape[1]
    if follows_length and isinstance(call := running(), LayerCall):
        # The module goes by the greatest position it is asked for. Gates ask for a part of the text, and are
        # to turn it, and leave the module, as the model did in this pass.
        last = call.given["position_ids"].max().to(positions.device)
        positions = torch.cat((positions, last.expand(len(positions), 1)), 1)
    # Some modules return every angle twice, others once.
    # In a model over several devices the module may be on another one than the gate.
    angles = found(like, positions, *_kind_of_layer(found))
    cos, sin = (x[:, :count, :turned].to(positions.device) for x in angles)
    still = width // 2 - turned
    cos, sin = F.pad(cos, (0, still), value=1.0), F.pad(sin, (0, still))
    # The fastest come first.
    cos, sin = cos[..., (width - dim) // 2 :], sin[..., (width - dim) // 2 :]
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


class Unrotate:
    """Rotates cached keys back to what gates read.

    Args:
        model: A transformers model of a supported family.

    Attributes:
        why_not: Why that is impossible for this model, in a few words, or None.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config.get_text_config()
        self.rotates = getattr(family_of(model), "rotates", None)
        self.order = head_order(model)
        self.rotary: Rotary | None = None
        kind = by_length(self.config)
        self.why_not = None if kind is None else f"RoPE is of type {kind}, and {LONGROPE}"
        if self.why_not is None:
            try:
                self.rotary = model_rotary(model, head_dim_of(self.config))
            except NotImplementedError as error:
                # Gates that do not rotate may be attached all the same.
                self.why_not = str(error)

    def angles(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of a layer's rotation to positions int64 ``[B, T]``.

        Of the pairs that are turned, at most half of a head's values: ``[B, T, R]`` each.
        """
        assert self.rotary is not None
        cos, sin = self.rotary(positions)
        pairs = cos.shape[-1] // 2
        return cos[..., :pairs], sin[..., :pairs]

    def __call__(self, layer: int, k: Tensor, positions: Tensor) -> Tensor:
        """Rotate back.

        Args:
            layer: Layer index.
            k: Keys after the rotary embedding, ``[B, Hk, T, D]``.
            positions: int64 ``[B, T]``, at which the model rotated them.

        Returns:
            The keys before it, in the order of values in which gates see them.
        """
        if self.order is not None:
            k = k[..., self.order.to(k.device)]
        if self.rotates is not None and not self.rotates(self.config, layer):
            return k
        return rotate_back(k, *self.angles(layer, positions))
