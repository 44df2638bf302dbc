"""The configuration of attached modules: the model's own, but for the name of the attention function."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from seerattention.hosts.transformers.request import Switch

#: Name under which the attention function is registered with transformers.
NAME = "seerattention"


@dataclass
class Behind:
    """What is behind a view of a configuration.

    Attributes:
        own: The configuration that it is a view of.
        switch: Says for which requests the attention function is ours.
        decoder: The module that the view was made for.
    """

    own: PreTrainedConfig
    switch: Switch
    decoder: nn.Module


class View:
    """A configuration that shares every setting with another one and names our attention function.

    Models of one configuration do not notice, changes go both ways, and whoever takes our name for the
    model's own, as a model made from this configuration does, changes nothing.
    """

    __slots__ = ()
    behind_seerattention: Behind

    @property
    def _attn_implementation_internal(self) -> str | None:
        return self.__dict__["_attn_implementation_internal"]

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, name: str | None) -> None:
        if name != NAME:
            self.__dict__["_attn_implementation_internal"] = name

    @property
    def _attn_implementation(self) -> str | None:
        # In compiled code the attention and mask functions, which are not compiled, hand over instead.
        if torch.compiler.is_compiling() or self.behind_seerattention.switch.mode.handler is not None:
            return NAME
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, name: str | dict[str, Any] | None) -> None:
        own: Any = self.behind_seerattention.own
        own._attn_implementation = name

    def __deepcopy__(self, memo: dict[int, Any]) -> PreTrainedConfig:
        behind = self.behind_seerattention
        own = copy.deepcopy(behind.own, memo)
        if id(behind.decoder) not in memo:
            return own
        # The model is copied whole, so the copy is attached too.
        return view(own, copy.deepcopy(behind.switch, memo), memo[id(behind.decoder)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.behind_seerattention.own.__reduce_ex__(protocol)


def view(config: PreTrainedConfig, switch: Switch, decoder: nn.Module) -> Any:
    """Return a view of a configuration for the modules of an attached model; see `Behind`."""
    made = object.__new__(_class_of(type(config)))
    made.__dict__ = config.__dict__
    object.__setattr__(made, "behind_seerattention", Behind(config, switch, decoder))
    return made


@functools.cache
def _class_of(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the views' class; of the same name, since transformers looks configurations up by it."""
    slots = ("behind_seerattention",)
    return type(kind.__name__, (View, kind), {"__slots__": slots, "__module__": kind.__module__})
