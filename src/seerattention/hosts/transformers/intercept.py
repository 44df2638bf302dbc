"""Hand over a model's attention: q and k before and after RoPE, per call, to a handler."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers import __version__ as host_version
from transformers.masking_utils import create_masks_for_generate

from seerattention.engine.call import Handler
from seerattention.hosts.transformers.base import head_dim_of, unwrapped
from seerattention.hosts.transformers.config import NAME, view
from seerattention.hosts.transformers.continuous import forget_manager, manager_of
from seerattention.hosts.transformers.family import Tap, attention_layers, family_of
from seerattention.hosts.transformers.functions import (
    CACHE_NAMES,
    attention_forward,
    by_name,
    cache_of,
    count_call,
    held_of,
    padding_mask,
    paged,
    refuse,
)
from seerattention.hosts.transformers.request import KEYWORD, LayerCall, Mode, Pass, Switch, running
from seerattention.hosts.transformers.rotary import head_order
from seerattention.hosts.transformers.support import CACHE, FULLGRAPH

# Several threads may intercept one model; the last to leave takes the hooks off.
_INSTALLING = threading.Lock()


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """Return a KV cache as the keyword argument by which a model and its ``generate`` take it.

    Args:
        model: A transformers model, or what `torch.compile` or PEFT made of one.
        cache: The KV cache.

    Raises:
        RuntimeError: If the model takes none by a name that is known.
    """
    takes = inspect.signature(type(unwrapped(model)).forward).parameters
    for name in CACHE_NAMES:
        if name in takes:
            return {name: cache}
    raise RuntimeError(
        f"{type(unwrapped(model)).__name__} takes no KV cache, only {', '.join(takes)}, "
        f"with transformers {host_version}; {CACHE}"
    )


@dataclass(eq=False)
class Taps:
    """The hooks of one attention module, which hand over q and k before RoPE.

    Bound methods are hooked, not closures: a deep copy of the model then has hooks of its own. What they
    find they give to the `LayerCall` at hand; here nothing of a call is kept.
    """

    switch: Switch
    layer: int
    attention: nn.Module
    taps_of: Callable[[nn.Module], tuple[nn.Module | Tap, nn.Module | Tap]]
    head_dim: int
    order: Tensor | None
    hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.of_q, self.of_k = self._found()

    def _found(self) -> tuple[Tap, Tap]:
        """Return where the family says q and k are."""
        q, k = self.taps_of(self.attention)
        return q if isinstance(q, Tap) else Tap(q), k if isinstance(k, Tap) else Tap(k)

    def connect(self) -> None:
        """Hook the modules."""
        self.attention.__dict__["_seerattention_taps"] = self
        self.hooks = [
            *(module.register_forward_hook(self.keep) for module in {self.of_q.module, self.of_k.module}),
            self.attention.register_forward_pre_hook(self.before, with_kwargs=True),
        ]

    def disconnect(self) -> None:
        """Take the hooks off again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.attention.__dict__.pop("_seerattention_taps", None)

    def follow(self) -> None:
        """Move the hooks where a module was replaced, as by an adapter that wraps it."""
        of_q, of_k = self._found()
        if of_q.module is not self.of_q.module or of_k.module is not self.of_k.module:
            self.disconnect()
            self.of_q, self.of_k = of_q, of_k
            self.connect()

    @torch.compiler.disable(reason=FULLGRAPH)
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the attention module: begin a call."""
        # Layers that activation checkpointing computes again come with the pass that they were part of.
        given = by_name(module, args, kwargs)
        part_of: Pass = kwargs.get(KEYWORD) or begin(self.switch, given)
        cache = cache_of(given)
        held = held_of(cache, self.layer)
        count_call(cache, self.layer)
        if part_of.mode.handler is None:
            return None
        if self.switch.mode.handler is None:
            raise RuntimeError(
                "a sparse layer is computed again inside dense(model); leave dense(model) first"
            )
        call = LayerCall(self, part_of, given, held)
        return args, {**kwargs, KEYWORD: call}

    @torch.compiler.disable(reason=FULLGRAPH)
    def keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the modules, or the one, whose outputs are q and k before RoPE."""
        call = running()
        if isinstance(call, LayerCall) and call.taps is self:
            if module is self.of_q.module:
                call.q = self._by_head(output, self.of_q)
            if module is self.of_k.module:
                call.k = self._by_head(output, self.of_k)

    def _by_head(self, output: Tensor, tap: Tap) -> Tensor:
        """Return a tapped output as ``[B, H, T, D]``, its values in the order in which gates rotate them."""
        if tap.columns is not None:
            output = output[..., tap.columns]
        if output.dim() == 3:
            output = output.unflatten(-1, (-1, self.head_dim))
        if not tap.heads_first:
            output = output.transpose(1, 2)
        if self.order is None:
            return output
        if self.order.device != output.device:
            self.order = self.order.to(output.device)
        return output[..., self.order]


@dataclass
class Runtime:
    """What is attached to one model.

    Attributes:
        model: The model.
        switch: Says what computes its attention.
        taps: One per attention layer.
        hooks: Other hooks.
        owner: What `attach` keeps here; None while only `intercept` is there.
    """

    model: PreTrainedModel
    switch: Switch
    taps: list[Taps]
    hooks: list[Any] = field(default_factory=list)
    owner: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.owner is not None:
            # The gates of a copied model are that copy's, as those of the first are the first's.
            self.owner.used_by(self.model)

    def connect(self) -> None:
        """Hook the model's modules and take over its attention."""
        self.show()
        for taps in self.taps:
            taps.connect()
        # The decoder, because it can be called without its head.
        self.hooks = [self.model.get_decoder().register_forward_pre_hook(self.before, with_kwargs=True)]
        self.model.__dict__["create_masks_for_generate"] = self.masks_for_generate
        self.model.__dict__["init_continuous_batching"] = self.continuous_batching

    def disconnect(self) -> None:
        """Take the hooks off and give the model its own attention back."""
        for taps in self.taps:
            taps.disconnect()
        for hook in self.hooks:
            hook.remove()
        for module in self._attending():
            if getattr(module.config, "seerattention_switch", None) is self.switch:
                module.config = module.config.seerattention_own
        forget_manager(self.model, self.switch)
        for name in ("create_masks_for_generate", "init_continuous_batching"):
            del self.model.__dict__[name]

    def show(self) -> None:
        """Give the modules that attend a view of their configuration; in copies they have none at first."""
        views: dict[int, Any] = {}
        for module in self._attending():
            if getattr(module.config, "seerattention_switch", None) is not self.switch:
                module.config = views.setdefault(id(module.config), view(module.config, self.switch))

    def _attending(self) -> list[Any]:
        """Return the modules that look up what attends."""
        return [self.model.get_decoder(), *(taps.attention for taps in self.taps)]

    @torch.compiler.disable(reason=FULLGRAPH)
    def before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the decoder: begin a pass."""
        given = by_name(decoder, args, kwargs)
        begun = begin(self.switch, given)
        if begun.mode.handler is not None:
            self.show()
            refuse(decoder, given)
            for taps in self.taps:
                taps.follow()
        return args, {**kwargs, KEYWORD: begun}

    def masks_for_generate(self, *, attention_mask: Tensor | None, **inputs: Any) -> Any:
        """Stand in for what makes masks ahead for static caches: ours marks padding only."""
        if self.switch.mode.handler is not None:
            return attention_mask
        own = getattr(type(self.model), "create_masks_for_generate", create_masks_for_generate)
        return own(attention_mask=attention_mask, **inputs)

    def continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a method of the model; on a GPU it would quietly take another attention function."""
        if self.switch.mode.handler is not None:
            refuse_stand_in(self.switch)
        return manager_of(self.model, self.switch, lambda: runtime_of(self.model) is self, args, kwargs)


def begin(switch: Switch, given: dict[str, Any]) -> Pass:
    """Begin a pass, of the decoder or of a layer that is called without; from a module's keywords."""
    begun = Pass(switch)
    if begun.mode.prompts is None and paged(given):
        # Managers that were made before anything was attached go on as they began.
        begun.mode = Mode(None)
    return begun


def runtime_of(model: nn.Module) -> Runtime | None:
    """Return what is attached, if anything."""
    return model.__dict__.get("_seerattention_runtime")


def refuse_stand_in(switch: Switch) -> None:
    """Raise what cannot be done while something stands in for what is attached, in the request that asks."""
    if switch.handler is not None and switch.mode.handler is None:
        raise ValueError("this model is dense for the moment; leave dense(model) first")
    if switch.handler is None or switch.mode.stands_in:
        raise ValueError("this model's attention is intercepted; leave intercept(model, ...) first")


def idle_runtime(model: nn.Module) -> Runtime | None:
    """Return what is attached, refusing while something stands in for it, here or for another request."""
    runtime = runtime_of(model)
    if runtime is None:
        return None
    refuse_stand_in(runtime.switch)
    if runtime.switch.guests:
        raise ValueError(
            "a request of this model is inside dense, intercept or prefill, or a manager of continuous "
            "batching runs; let it end, or stop() it, before you change what is attached"
        )
    return runtime


def install(model: PreTrainedModel, handler: Handler | None = None) -> Runtime:
    """Let a handler compute the model's attention, or none but what `intercept` brings."""
    family = family_of(model)
    # Whatever can fail comes first, so that a failure leaves the model as it was.
    head_dim = head_dim_of(model.config.get_text_config())
    order, switch = head_order(model), Switch(handler)
    layers = attention_layers(model).items()
    runtime = Runtime(model, switch, [Taps(switch, i, a, family.taps, head_dim, order) for i, a in layers])
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)
    runtime.connect()
    model.__dict__["_seerattention_runtime"] = runtime
    return runtime


def uninstall(model: PreTrainedModel) -> None:
    """Undo `install`."""
    model.__dict__.pop("_seerattention_runtime").disconnect()


@contextmanager
def intercept(model: PreTrainedModel, handler: Handler) -> Iterator[PreTrainedModel]:
    """Let a handler compute the attention of every full-attention layer while the context lasts.

    Works on a plain model and on one with gates attached, whose handler it stands in for; requests of other
    threads go on as without.

    Args:
        model: A transformers model of a supported family.
        handler: Called with an `AttentionCall`, returns the output, of ``call.q``'s shape.
    """
    model = unwrapped(model)
    with ExitStack() as inside:
        with _INSTALLING:
            runtime = runtime_of(model) or install(model)
            if runtime.owner is not None and runtime.switch.mode.handler is None:
                refuse_stand_in(runtime.switch)
            inside.enter_context(runtime.switch.within(handler=handler, stands_in=True))
        try:
            yield model
        finally:
            with _INSTALLING:
                inside.close()
                if runtime.owner is None and not runtime.switch.guests:
                    uninstall(model)
