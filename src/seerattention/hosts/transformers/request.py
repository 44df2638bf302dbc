"""What one request needs while it runs: it travels with the call, and none of it is kept on a module."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seerattention.device import capturing
from seerattention.engine.call import Choices, Handler, Held
from seerattention.engine.padding import Lengths, Padding
from seerattention.hosts.transformers.support import MASKS

#: The keyword under which a pass travels through the model's layers to the attention function.
KEYWORD = "seerattention"


@dataclass(frozen=True)
class Mode:
    """How a model computes attention for one request.

    Attributes:
        handler: Computes the layers with full attention; None leaves the model as it is without us.
        stands_in: Whether it is another one than is attached: inside ``dense`` or ``intercept``.
        prompt_tokens: See `AttentionCall`.
        prompts: In continuous batching, the tokens of every request's prompt, in the order of the batch.
    """

    handler: Handler | None
    stands_in: bool = False
    prompt_tokens: int | None = None
    prompts: tuple[int, ...] | None = None


class Switch:
    """A model's mode: one for all requests, and others for those inside `within`.

    Requests are told apart by their context (`contextvars`), so those of other threads and tasks go on.

    Args:
        handler: What requests get by default.
    """

    def __init__(self, handler: Handler | None = None) -> None:
        self.handler = handler
        self.guests = 0
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # No request is inside a copy.
        return Switch, (self.handler,)

    @property
    def mode(self) -> Mode:
        """The mode of the request that asks."""
        return _modes.get().get(self) or Mode(self.handler)

    @contextmanager
    def within(self, **changes: Any) -> Iterator[None]:
        """Change the mode of the request that asks, while the context lasts."""
        token = _modes.set({**_modes.get(), self: replace(self.mode, **changes)})
        with self.lock:
            self.guests += 1
        try:
            yield
        finally:
            _modes.reset(token)
            with self.lock:
                self.guests -= 1


_modes: ContextVar[Mapping[Switch, Mode]] = ContextVar("seerattention_modes", default={})  # noqa: B039


class Pass:
    """One forward pass of a model.

    Args:
        switch: The model's.

    Attributes:
        requests: In continuous batching, (new tokens, keys) of every request, by the kind of layer.
        chosen: What layers chose so far, by request of a batch and by where a part of it begins; outside of
            continuous batching there is one of both.
    """

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.mode = switch.mode
        self.paddings: list[tuple[Tensor, int | None, Padding | None]] = []
        self.known_lengths: list[tuple[Tensor | None, torch.device, Lengths | None]] = []
        self.requests: dict[str, list[tuple[int, int]]] = {}
        self.chosen: defaultdict[int, dict[int, Choices]] = defaultdict(dict)
        _running.set(weakref.ref(self))

    def lengths(
        self, mask: Tensor | None, new: int, held: int | Tensor, *, batch: int, device: torch.device
    ) -> Lengths | None:
        """Return `Lengths.of` for a step of decoding, found once for all layers of one mask and device."""
        for known, on, lengths in self.known_lengths:
            if known is mask and on == device:
                return lengths
        found = None
        if mask is None or mask.dim() == 2:
            real = None if mask is None else mask.bool()
            found = Lengths.of(real, held, new, batch=batch, device=device, trust=capturing(device))
        self.known_lengths.append((mask, device, found))
        return found

    def padding(
        self, mask: Tensor | None, num_queries: int, num_keys: int, seen: int | None
    ) -> Padding | None:
        """Look for padding, once for all layers of one mask.

        Args:
            mask: ``[B, Tk]``, nonzero for real tokens, or None.
            num_queries: Query tokens, the last columns of the mask.
            num_keys: Key tokens, all columns of the mask.
            seen: Columns of the mask that count, where a cache's buffer is longer than what it holds.

        Raises:
            ValueError: If the mask is not of two dimensions, or does not cover all keys.
        """
        if mask is None:
            return None
        for known, columns, padding in self.paddings:
            if known is mask and columns == seen:
                return padding
        if mask.dim() != 2:
            raise ValueError(f"the attention mask must mark padding, [B, T], got {list(mask.shape)}; {MASKS}")
        real = mask[:, :seen].bool()
        if real.shape[1] != num_keys:
            raise ValueError(
                f"the attention mask covers {real.shape[1]} tokens, but there are {num_keys}; give one that "
                "covers the tokens already cached too"
            )
        found = Padding.of(real, num_queries)
        self.paddings.append((mask, seen, found))
        return found


@dataclass(eq=False)
class LayerCall:
    """One call of an attention module, from its beginning to the attention function.

    Attributes:
        taps: The module's hooks.
        part_of: The forward pass.
        given: The module's keywords.
        before: What the KV cache held of the layer.
        q: Before RoPE, once its tap ran.
        k: Before RoPE.
    """

    taps: Any
    part_of: Pass
    given: dict[str, Any]
    before: Held | None = None
    q: Tensor | None = None
    k: Tensor | None = None

    def __post_init__(self) -> None:
        _running.set(weakref.ref(self))


def running() -> Pass | LayerCall | None:
    """Return what began last in this context, a pass or a layer's call, if it is not over."""
    found = _running.get()
    return None if found is None else found()


# Weakly, so that what an exception interrupts does not stay alive: the model's frames hold it.
_running: ContextVar[weakref.ref[Pass | LayerCall] | None] = ContextVar("seerattention_running", default=None)
