"""Hand over a model's attention: q and k before and after RoPE, per call, to a handler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers import __version__ as host_version
from transformers.masking_utils import flash_attention_mask

from seerattention.engine.call import AttentionCall, Handler
from seerattention.hosts.transformers.base import head_dim_of
from seerattention.hosts.transformers.family import Family, Tap, attention_layers, family_of
from seerattention.hosts.transformers.padding import real_tokens
from seerattention.hosts.transformers.rotary import head_order
from seerattention.hosts.transformers.support import CACHE, CONTINUOUS, DROPOUT, FULLGRAPH, MAPS, PACKED
from seerattention.ops.dense_attention import dense_attention

#: Name under which the attention function is registered with transformers.
NAME = "seerattention"

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


class _Taps:
    """What one attention module hands over during a call: q and k before RoPE, and its keywords."""

    def __init__(
        self, runtime: Runtime, layer: int, attention: nn.Module, family: Family, order: Tensor | None
    ) -> None:
        self.runtime = runtime
        self.layer = layer
        self.attention = attention
        self.taps_of = family.taps
        self.order = order
        self.of_q, self.of_k = self._found()
        self.hooks: list[Any] = []
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.given: dict[str, Any] = {}

    def _found(self) -> tuple[Tap, Tap]:
        """Return where the family says q and k are."""
        q, k = self.taps_of(self.attention)
        return q if isinstance(q, Tap) else Tap(q), k if isinstance(k, Tap) else Tap(k)

    def connect(self) -> None:
        """Hook the modules."""
        self.attention.__dict__["_seerattention_taps"] = self
        self.hooks = [
            self.of_q.module.register_forward_hook(self.keep_q),
            self.of_k.module.register_forward_hook(self.keep_k),
            self.attention.register_forward_pre_hook(self.before, with_kwargs=True),
        ]

    def disconnect(self) -> None:
        """Take the hooks off again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.attention.__dict__.pop("_seerattention_taps", None)
        self.q = self.k = None
        self.given = {}

    def follow(self) -> None:
        """Move the hooks where a module was replaced, as by an adapter that wraps it."""
        of_q, of_k = self._found()
        if of_q.module is not self.of_q.module or of_k.module is not self.of_k.module:
            self.disconnect()
            self.of_q, self.of_k = of_q, of_k
            self.connect()

    # Bound methods, not closures: a deep copy of the model then hands over to its own copy of the taps.
    def keep_q(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the module whose output is q before RoPE."""
        self.q = self._by_head(output, self.of_q)

    def keep_k(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the module whose output is k before RoPE."""
        self.k = self._by_head(output, self.of_k)

    def _by_head(self, output: Tensor, tap: Tap) -> Tensor:
        """Return a tapped output as ``[B, H, T, D]``, its values in the order in which gates rotate them."""
        if tap.columns is not None:
            output = output[..., tap.columns]
        if output.dim() == 3:
            output = output.unflatten(-1, (-1, self.runtime.head_dim))
        if not tap.heads_first:
            output = output.transpose(1, 2)
        if self.order is None:
            return output
        if self.order.device != output.device:
            self.order = self.order.to(output.device)
        return output[..., self.order]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention module: remember its keywords."""
        self.given = kwargs

    def take(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return and forget q and k before RoPE and the keywords of this call."""
        assert self.q is not None, "the family's taps did not run"
        assert self.k is not None, "the family's taps did not run"
        taken = self.q, self.k, self.given
        self.q = self.k = None
        self.given = {}
        return taken


@dataclass
class Runtime:
    """What is attached to one model.

    Attributes:
        handler: Computes its attention.
        previous_attention: The implementation that it had before.
        head_dim: Dimension of a head.
        taps: One per attention layer.
        hooks: Other hooks.
        owner: What `attach` keeps here; None while only a handler is there.
        paused: Whether the model is for the moment as it was before.
    """

    handler: Handler
    previous_attention: str | None
    head_dim: int
    taps: list[_Taps] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    owner: Any = None
    paused: bool = False

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder."""
        _refuse(decoder, args, kwargs)
        for taps in self.taps:
            taps.follow()


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model inside what `torch.compile` and PEFT make of one."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", ()):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def runtime_of(model: nn.Module) -> Runtime | None:
    """Return what is attached, if anything."""
    return model.__dict__.get("_seerattention_runtime")


def idle_runtime(model: nn.Module) -> Runtime | None:
    """Return what is attached, refusing while something stands in for it."""
    runtime = runtime_of(model)
    if runtime is None:
        return None
    if runtime.paused:
        raise ValueError("this model is dense for the moment; leave dense(model) first")
    if runtime.owner is None or runtime.handler is not runtime.owner.handler:
        raise ValueError("this model's attention is intercepted; leave intercept(model, ...) first")
    return runtime


@torch.compiler.disable(reason=FULLGRAPH)
def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: queries and keys after RoPE, ``[B, H, T, D]``."""
    if dropout:
        raise NotImplementedError(f"attention dropout ({dropout}) is not supported; {DROPOUT}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    taps: _Taps = module.__dict__["_seerattention_taps"]
    q_nope, k_nope, given = taps.take()
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    position_ids = given.get("position_ids")
    if cache is None and key.shape[2] != k_nope.shape[2]:
        raise RuntimeError(
            f"layer {taps.layer} attends to {key.shape[2]} keys, {k_nope.shape[2]} of them new, and was "
            f"given no KV cache, only {', '.join(given)}, by transformers {host_version}; {CACHE}"
        )
    mixed = torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64
    if mixed:
        # Rotations, norms and caches give back 32 bits where projections gave 16; torch's own attention
        # functions, too, take what autocast says.
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value, q_nope, k_nope = (x.to(half) for x in (query, key, value, q_nope, k_nope))
    if cache is not None and (seen := int(cache.get_seq_length(taps.layer))) < key.shape[2]:
        # A static cache hands over its whole buffer.
        key, value = key[:, :, :seen], value[:, :, :seen]
        attention_mask = None if attention_mask is None else attention_mask[:, :seen]

    def compute(
        q: Tensor, k: Tensor, v: Tensor, qn: Tensor, kn: Tensor, slot: int | None, ids: Tensor | None
    ) -> Tensor:
        if sliding_window is not None:
            return dense_attention(q, k, v, scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
        positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        # Handlers and their ops choose their own precision.
        with torch.autocast(q.device.type, enabled=False) if mixed else nullcontext():
            return taps.runtime.handler(
                AttentionCall(taps.layer, q, k, v, qn, kn, positions, scale, slot, cache, softcap, s_aux, ids)
            )

    rows = real_tokens(attention_mask, query.shape[2], key.shape[2])
    if rows is None:
        return compute(query, key, value, q_nope, k_nope, None, position_ids).transpose(1, 2), None
    out = torch.zeros_like(query)
    for b, (of_q, of_k) in enumerate(rows):
        if of_q.numel():
            one = slice(b, b + 1)
            q, qn, kn = (x[one][:, :, of_q] for x in (query, q_nope, k_nope))
            k, v = key[one][:, :, of_k], value[one][:, :, of_k]
            # With padding between its tokens, a row's last position does not tell the others.
            ids = None
            if position_ids is not None and int(of_k[-1] - of_k[0]) == len(of_k) - 1:
                ids = position_ids.expand(len(rows), -1)[one, of_q]
            out[one, :, of_q] = compute(q, k, v, qn, kn, b, ids)
    return out.transpose(1, 2), None


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


def _refuse_paging(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method of the model; on a GPU it would quietly take another attention function."""
    raise NotImplementedError(CONTINUOUS)


def install(model: PreTrainedModel, handler: Handler) -> Runtime:
    """Let a handler compute the model's attention."""
    family = family_of(model)
    # Whatever can fail comes first, so that a failure leaves the model as it was.
    head_dim = head_dim_of(model.config.get_text_config())
    runtime = Runtime(handler, model.config._attn_implementation, head_dim)
    order = head_order(model)
    runtime.taps = [_Taps(runtime, i, a, family, order) for i, a in attention_layers(model).items()]
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    connect(model, runtime)
    model.__dict__["_seerattention_runtime"] = runtime
    return runtime


def connect(model: PreTrainedModel, runtime: Runtime) -> None:
    """Hook the model's modules and take over its attention."""
    model.set_attn_implementation(NAME)
    for taps in runtime.taps:
        taps.follow()
        taps.connect()
    # The decoder, because it can be called without its head.
    model.__dict__["init_continuous_batching"] = _refuse_paging
    runtime.hooks = [model.get_decoder().register_forward_pre_hook(runtime.before, with_kwargs=True)]


def disconnect(model: PreTrainedModel, runtime: Runtime) -> None:
    """Take the hooks off and give the model its own attention back."""
    for taps in runtime.taps:
        taps.disconnect()
    for hook in runtime.hooks:
        hook.remove()
    runtime.hooks = []
    model.__dict__.pop("init_continuous_batching", None)
    model.set_attn_implementation(runtime.previous_attention)  # type: ignore[arg-type]


def uninstall(model: PreTrainedModel) -> None:
    """Undo `install`."""
    disconnect(model, model.__dict__.pop("_seerattention_runtime"))


@contextmanager
def intercept(model: PreTrainedModel, handler: Handler) -> Iterator[PreTrainedModel]:
    """Let a handler compute the attention of every full-attention layer while the context lasts.

    Works on a plain model and on one with gates attached, whose handler it stands in for.

    Args:
        model: A transformers model of a supported family.
        handler: Called with an `AttentionCall`, returns the output ``[B, Hq, Tq, D]``.
    """
    model = unwrapped(model)
    runtime = runtime_of(model)
    if runtime is not None and runtime.paused:
        raise ValueError("this model is dense for the moment; leave dense(model) first")
    if runtime is not None:
        before, runtime.handler = runtime.handler, handler
        try:
            yield model
        finally:
            runtime.handler = before
        return
    install(model, handler)
    try:
        yield model
    finally:
        uninstall(model)
