"""A model's gates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seerattention.gate import AttnGate, GateConfig
from seerattention.gate_config import design_of
from seerattention.hosts.transformers.base import BaseInfo, device_of, unwrapped
from seerattention.hosts.transformers.family import family_of, full_attention_layers
from seerattention.hosts.transformers.rotary import model_rotary, no_rotation
from seerattention.policies import Calibration

#: Key of a gate's parameter in a file: layer and the parameter's name.
KEY = "model.layers.{}.self_attn.attn_gate.{}"

#: More than any model has.
LAYERS = 1000

#: What weights of gates may be.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_layers(layers: int) -> None:
    """Refuse a number of layers that no model has, before a gate is made for each."""
    if not 1 <= layers <= LAYERS:
        raise ValueError(f"gates are for 1 to {LAYERS:,} layers, got {layers}")


def infinite(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of weights that hold NaN or infinity."""
    return [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]


def check_finite(weights: Mapping[str, Tensor], where: str = "") -> None:
    """Refuse weights, by key, that hold NaN or infinity."""
    for key in infinite(weights):
        raise ValueError(
            f"{key}{where} holds NaN or infinity; train the gates again from a state that is finite"
        )


def check_weights(file: Path, weights: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse weights of a file, by key, whose keys or shapes are not those expected, or not finite."""
    again = "save or download the gates again"
    for what, keys in (("missing", set(shapes) - set(weights)), ("extra", set(weights) - set(shapes))):
        if keys:
            raise ValueError(f"{file} has {len(keys)} {what} gate keys, the first is {min(keys)}; {again}")
    for key, shape in shapes.items():
        if tuple(weights[key].shape) != tuple(shape):
            raise ValueError(
                f"{key} in {file} is {list(weights[key].shape)}, its configuration needs {list(shape)}; "
                f"{again}"
            )
        if weights[key].dtype not in DTYPES:
            raise ValueError(f"{key} in {file} is {weights[key].dtype}, no precision of gates; {again}")
    check_finite(weights, f" in {file}")


class Gates(nn.Module):
    """One gate per full-attention layer, or for several behind one another, all of one configuration.

    Args:
        config: The gates' design.
        base: The model they belong to.
        layers: Layer indices that have a gate: all full-attention layers, or every second, third ... of
            them, and those in between read what the nearest before them chose.
        policy: Text form of the policy they were saved with for prefill, if any.
        calibration: What the policy ``calibrated`` means for them, if they were calibrated.
        decode_policy: Text form of the policy they were saved with for decoding, if any.
        reach: Up to which position they were taught, None where that is not known.
    """

    def __init__(
        self,
        config: GateConfig,
        base: BaseInfo,
        layers: list[int],
        policy: str | None = None,
        calibration: Calibration | None = None,
        decode_policy: str | None = None,
        reach: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.base = base
        self.policy = policy
        self.decode_policy = decode_policy
        self.reach = reach
        self.calibration = calibration
        self.layers = nn.ModuleDict({str(i): AttnGate(config) for i in layers})

    def items(self) -> Iterator[tuple[int, AttnGate]]:
        """Iterate over (layer index, gate)."""
        for index, gate in self.layers.items():
            assert isinstance(gate, AttnGate)
            yield int(index), gate

    def score_in(self, dtype: Literal["float8_e4m3fn"] | None) -> Self:
        """Let all gates multiply summaries rounded to a dtype, or as they are; see `GateConfig.score_dtype`.

        Weights stay what they are, and gates that are attached choose so from their next call on.

        Returns:
            These gates.

        Raises:
            ValueError: If it is no such dtype, or these gates do not choose for blocks of queries.
        """
        self.config = replace(self.config, score_dtype=dtype)
        for _, gate in self.items():
            gate.config = self.config
        return self

    def shared(self, layers: Iterable[int]) -> dict[int, int]:
        """Return which layer with a gate chooses for each of a model's full-attention layers that has none.

        Raises:
            ValueError: If the gates are not of all of these layers, nor of every second, third ... of them.
        """
        have, layers = [index for index, _ in self.items()], list(layers)
        if not any(layers[::n] == have for n in range(1, len(layers) + 1)):
            raise ValueError(
                f"these gates are for layers {have}; the model's full-attention layers are {layers}; "
                "make them by new_gates"
            )
        return {i: max(j for j in have if j < i) for i in layers if i not in have}

    def named_weights(self) -> dict[str, Tensor]:
        """Return every gate's weights, by their keys in a file."""
        # Called, since a state dict has no numbers where the weights are offloaded.
        named = ((i, *child) for i, gate in self.items() for child in gate.named_children())
        return {KEY.format(i, f"{name}.weight"): weight().detach() for i, name, weight in named}

    def use_rotary_of(self, model: PreTrainedModel) -> None:
        """Let every gate rotate as its layer does, by the model's own rotary code, RoPE scaling included.

        Raises:
            ValueError: If another model uses these gates.
        """
        user = _USERS.get(self, lambda: None)()
        if user is not None and user is not model:
            raise ValueError(
                "these gates are attached to another model, which rotates, moves and converts them as its "
                "own; use copy.deepcopy(gates), or detach the other model first"
            )
        if not self.config.rope:
            return
        family, config = family_of(model), model.config.get_text_config()
        rotary = model_rotary(model, self.config.dim, self.config.rope_pairs)
        for index, gate in self.items():
            turns = not hasattr(family, "rotates") or family.rotates(config, index)
            gate.use_rotary(rotary if turns else no_rotation(self.config.dim))

    def used_by(self, model: PreTrainedModel | None) -> None:
        """Remember which model the gates are attached to, if any."""
        if model is None:
            _USERS.pop(self, None)
        else:
            _USERS[self] = ref(model)


# Not kept on the gates, whose copies and pickles are attached to nothing.
_USERS: WeakKeyDictionary[Gates, ref[PreTrainedModel]] = WeakKeyDictionary()


def new_gates(model: PreTrainedModel, *, layers_per_gate: int = 1, **settings: Any) -> Gates:
    """Make untrained gates for a model.

    Args:
        model: The base model.
        layers_per_gate: Full-attention layers behind one another that read what the first of them chose.
        settings: Fields of `GateConfig` other than the model's shape; those of gates for decoding alone
            have defaults of their own, `design_of`.

    Returns:
        Gates in fp32 on the device of the first such layer, for every layer with full attention, or for the
        first of every ``layers_per_gate``.

    Raises:
        NotImplementedError: If the model's family has no file.
        ValueError: If a setting does not fit, or no layer has full attention.
    """
    model = unwrapped(model)
    family_of(model)
    layers, base = full_attention_layers(model), BaseInfo.of(model)
    shape = {"num_heads": base.num_heads, "num_kv_heads": base.num_kv_heads, "head_dim": base.head_dim}
    if given := sorted(shape.keys() & settings.keys()):
        raise ValueError(f"{', '.join(given)} of gates is their model's; leave it out")
    if not (isinstance(layers_per_gate, int) and 1 <= layers_per_gate <= len(layers)):
        raise ValueError(
            f"layers_per_gate must be a whole number from 1 to {len(layers)}, the model's layers, got "
            f"{layers_per_gate!r}"
        )
    config = GateConfig.from_dict(design_of({**shape, **settings}))
    gates = Gates(config, base, list(layers)[::layers_per_gate])
    gates.use_rotary_of(model)
    return gates.to(device_of(next(iter(layers.values()))))
