"""Hand over a model's attention: q and k before and after RoPE, per call, to a handler."""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers import __version__ as host_version
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattention.engine.call import AttentionCall, Given, Handler
from seerattention.engine.summaries import Growing
from seerattention.hosts.transformers.base import head_dim_of, unwrapped
from seerattention.hosts.transformers.config import NAME, view
from seerattention.hosts.transformers.family import Tap, attention_layers, family_of
from seerattention.hosts.transformers.request import KEYWORD, LayerCall, Pass, Switch, running
from seerattention.hosts.transformers.rotary import head_order
from seerattention.hosts.transformers.support import CACHE, CONTINUOUS, DROPOUT, FULLGRAPH, MAPS, PACKED
from seerattention.ops.dense_attention import dense_attention
from seerattention.rows import Rows

# Several threads may intercept one model; the last to leave takes the hooks off.
_INSTALLING = threading.Lock()

#: Keywords by which transformers hands over a KV cache: from 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")


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
        part_of: Pass = kwargs.get(KEYWORD) or Pass(self.switch)
        if part_of.mode.handler is None:
            return None
        if self.switch.mode.handler is None:
            raise RuntimeError(
                "a sparse layer is computed again inside dense(model); leave dense(model) first"
            )
        call = LayerCall(self, part_of, kwargs)
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
        begun = Pass(self.switch)
        if begun.mode.handler is not None:
            self.show()
            _refuse(decoder, args, kwargs)
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
            raise NotImplementedError(CONTINUOUS)
        kind: Any = type(self.model)
        manager = kind.init_continuous_batching(self.model, *args, **kwargs)
        # It computes in a thread of its own, which is to be dense as well.
        loop = manager._run_generation_loop
        manager._run_generation_loop = functools.partial(contextvars.copy_context().run, loop)
        return manager


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
            "a request of this model is inside dense, intercept or prefill; let it end before you change "
            "what is attached"
        )
    return runtime


@torch.compiler.disable(reason=FULLGRAPH)
def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers: queries and keys after RoPE, ``[B, H, T, D]``."""
    call = kwargs.pop(KEYWORD, None)
    if isinstance(call, LayerCall):
        return _attend(call, query, key, value, attention_mask, **kwargs), None
    # Code that was compiled, or is computed again elsewhere, and modules that share our configuration.
    config: Any = module.config
    name = config._attn_implementation_internal
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    function = eager if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]
    with config.seerattention_switch.within(handler=None, stands_in=True):
        return function(module, query, key, value, attention_mask, **kwargs)


def _attend(
    call: LayerCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Let the handler of a call compute its layer; windows are dense. Returns ``[B, Tq, Hq, D]``."""
    if dropout:
        raise NotImplementedError(f"attention dropout ({dropout}) is not supported; {DROPOUT}")
    layer, handler, given = call.taps.layer, call.part_of.mode.handler, call.given
    assert handler is not None
    assert call.q is not None, "the family's taps did not run"
    assert call.k is not None, "the family's taps did not run"
    tensors = Given(query, key, value, call.q, call.k)
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    if cache is None and key.shape[2] != call.k.shape[2]:
        raise RuntimeError(
            f"layer {layer} attends to {key.shape[2]} keys, {call.k.shape[2]} of them new, and was "
            f"given no KV cache, only {', '.join(given)}, by transformers {host_version}; {CACHE}"
        )
    mixed = torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64
    if mixed:
        # Rotations, norms and caches give back 32 bits where projections gave 16; torch's own attention
        # functions, too, take what autocast says.
        half = torch.get_autocast_dtype(query.device.type)
        tensors = Given(*(x.to(half) for x in tensors))
    seen = None
    if cache is not None and int(cache.get_seq_length(layer)) < key.shape[2]:
        # A static cache hands over its whole buffer.
        seen = int(cache.get_seq_length(layer))
        tensors = tensors._replace(k=tensors.k[:, :, :seen], v=tensors.v[:, :, :seen])
    new, total = query.shape[2], tensors.k.shape[2]
    padding = call.part_of.padding(mask, new, total, seen)
    if padding is not None and not any(queries for queries, _ in padding.lengths):
        return torch.zeros_like(query).transpose(1, 2)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is not None:
        attend = dense_attention if padding is None else padding.dense
        out = attend(*tensors[:3], scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
        return out.transpose(1, 2)
    kept = {} if cache is None else cache.__dict__.setdefault("seerattention_summaries", {})
    inputs = AttentionCall(
        layer=layer,
        given=tensors,
        rows=Rows.last(new, total) if padding is None else padding.rows,
        scale=scale,
        softcap=softcap,
        sinks=s_aux,
        padding=padding,
        # Kept on the KV cache itself, so that copies of it copy them along.
        summaries=kept.setdefault(layer, Growing()),
        position_ids=given.get("position_ids"),
        prompt_tokens=call.part_of.mode.prompt_tokens,
    )
    # Handlers and their ops choose their own precision.
    with torch.autocast(query.device.type, enabled=False) if mixed else nullcontext():
        out = handler(inputs)
    return (out if padding is None else padding.queries.unpack(out)).transpose(1, 2)


@torch.compiler.disable(reason=FULLGRAPH)
def _mask(*, config: Any, attention_mask: Tensor | None, kv_length: int, **inputs: Any) -> Any:
    """Mask function for transformers: which keys are real, ``[B, Tk]``, or None."""
    now = running()
    begun, switch = now.part_of if isinstance(now, LayerCall) else now, config.seerattention_switch
    if begun is not None and begun.switch is switch and begun.mode.handler is not None:
        return None if attention_mask is None else attention_mask[:, -kv_length:]
    inputs |= {"config": config, "attention_mask": attention_mask, "kv_length": kv_length}
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation_internal)
    return None if function is None else function(**inputs)


def _refuse(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what attached models cannot do, before any work."""
    if kwargs.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise ValueError(MAPS)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    for name, given in (("input_ids", tokens), ("inputs_embeds", kwargs.get("inputs_embeds"))):
        if isinstance(given, Tensor) and given.numel() == 0:
            raise ValueError(f"empty prompt: {name} is {list(given.shape)}; give at least one token")
    positions = kwargs.get("position_ids")
    if positions is not None and kwargs.get("attention_mask") is None:
        jumps = (positions.diff(dim=-1) != 1).nonzero()
        if len(jumps):
            raise NotImplementedError(f"position_ids jump after token {int(jumps[0, -1])}: {PACKED}")


def install(model: PreTrainedModel, handler: Handler | None = None) -> Runtime:
    """Let a handler compute the model's attention, or none but what `intercept` brings."""
    family = family_of(model)
    # Whatever can fail comes first, so that a failure leaves the model as it was.
    head_dim = head_dim_of(model.config.get_text_config())
    order, switch = head_order(model), Switch(handler)
    layers = attention_layers(model).items()
    runtime = Runtime(model, switch, [Taps(switch, i, a, family.taps, head_dim, order) for i, a in layers])
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask)
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
