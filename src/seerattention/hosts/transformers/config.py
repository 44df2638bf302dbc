"""The configuration of attached modules: the model's own, but for the name of the attention function."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import PreTrainedConfig

from seerattention.hosts.transformers.request import Switch

#: Name under which the attention function is registered with transformers.
NAME = "seerattention"


class View:
    """A configuration that shares every setting with another one and names our attention function.

    Models of one configuration do not notice, changes go both ways, and whoever takes our name for the
    model's own, as a model made from this configuration does, changes nothing. Copies are of the other one.

    Attributes:
        seerattention_own: The other configuration.
        seerattention_switch: Says for which requests the attention function is ours.
    """

    __slots__ = ()
    seerattention_own: Any
    seerattention_switch: Switch

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
        if torch.compiler.is_compiling() or self.seerattention_switch.mode.handler is not None:
            return NAME
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, name: str | dict[str, Any] | None) -> None:
        self.seerattention_own._attn_implementation = name

    def __deepcopy__(self, memo: dict[int, Any]) -> PreTrainedConfig:
        return copy.deepcopy(self.seerattention_own, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _own, (self.seerattention_own,)


def _own(config: PreTrainedConfig) -> PreTrainedConfig:
    return config


def view(config: PreTrainedConfig, switch: Switch) -> Any:
    """Return a view of a configuration for the modules of an attached model, see `View`."""
    config = getattr(config, "seerattention_own", config)
    made = object.__new__(_class_of(type(config)))
    made.__dict__ = config.__dict__
    for name, value in (("seerattention_own", config), ("seerattention_switch", switch)):
        object.__setattr__(made, name, value)
    return made


@functools.cache
def _class_of(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the views' class; of the same name, since transformers looks configurations up by it."""
    slots = ("seerattention_own", "seerattention_switch")
    return type(kind.__name__, (View, kind), {"__slots__": slots, "__module__": kind.__module__})
