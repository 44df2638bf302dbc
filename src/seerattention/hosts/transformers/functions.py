"""What transformers calls in place of a model's own attention and mask, and what of a call is refused."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as host_version
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattention.device import capturing
from seerattention.engine.call import AttentionCall, Cached, Given, Held, Step
from seerattention.engine.layer import SparseLayer
from seerattention.engine.padding import Lengths, Padding
from seerattention.engine.summaries import Growing
from seerattention.hosts.transformers.config import NAME
from seerattention.hosts.transformers.context import ContextParallelCache, attend_spread
from seerattention.hosts.transformers.continuous import BATCH, attend_requests, gathered
from seerattention.hosts.transformers.request import KEYWORD, LayerCall, running
from seerattention.hosts.transformers.support import (
    CACHE,
    CAPTURE,
    CAUSAL,
    DROPOUT,
    FULLGRAPH,
    MAPS,
    PACKED,
    SLIDING,
    UNKNOWN,
)
from seerattention.ops.dense_attention import dense_attention
from seerattention.rows import Rows

#: Keywords by which transformers hands over a KV cache: from 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")

#: Keywords that reach attention and ask nothing of it: for losses and outputs, or read in another place.
_NOT_ATTENTION = {
    "cache_position",
    "ignore_index",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "shift_labels",
    "use_cache",
}


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what a module was called with by name, also what was given by its place."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def cache_of(given: dict[str, Any]) -> Any:
    """Return the KV cache among a module's keywords, or None."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def paged(given: dict[str, Any]) -> bool:
    """Whether a module is called for a batch of continuous batching."""
    return isinstance(cache_of(given), PagedAttentionCache)


def held_of(cache: Any, layer: int) -> Held | None:
    """Return what a KV cache holds of a layer, None if that is nothing or cannot be told."""
    layers = getattr(cache, "layers", ())
    keys = getattr(layers[layer], "keys", None) if layer < len(layers) else None
    if not isinstance(keys, Tensor):
        return None
    length, kept = cache.get_seq_length(layer), summaries_of(cache).get(layer)
    return Held.of(keys, length if isinstance(length, Tensor) else None, 0 if kept is None else kept.calls)


def summaries_of(cache: Any) -> dict[int, Growing]:
    """Return what is kept of a KV cache's layers: on the KV cache itself, so that copies copy it along."""
    return {} if cache is None else cache.__dict__.setdefault("seerattention_summaries", {})


def count_call(cache: Any, layer: int) -> None:
    """Remember that a layer is called with a KV cache, whoever computes its attention."""
    if (kept := summaries_of(cache).get(layer)) is not None:
        kept.calls += 1


@torch.compiler.disable(reason=FULLGRAPH)
def attention_forward(
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
    if isinstance(lost := running(), LayerCall) and lost.taps.attention is module:
        raise RuntimeError(
            f"layer {lost.taps.layer} does not hand its keywords on to attention, only {', '.join(kwargs)}, "
            f"with transformers {host_version}, so gates cannot be used; detach(model)"
        )
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
    is_causal: bool | None = None,
    **others: Any,
) -> Tensor:
    """Let the handler of a call compute its layer; windows are dense. Returns ``[B, Tq, Hq, D]``."""
    _refuse_call(call, dropout, is_causal, others)
    layer, handler = call.taps.layer, call.part_of.mode.handler
    in_batch = call.part_of.mode.prompts is not None
    assert handler is not None
    assert call.q is not None, "the family's taps did not run"
    assert call.k is not None, "the family's taps did not run"
    if in_batch:
        key, value = gathered(others.get("cache"), layer, key, value, others)
    tensors = Given(query, key, value, call.q, call.k)
    _check_given(call, tensors)
    cache = cache_of(call.given)
    mixed = torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64
    if mixed:
        # Rotations, norms and caches give back 32 bits where projections gave 16; torch's own attention
        # functions, too, take what autocast says.
        half = torch.get_autocast_dtype(query.device.type)
        tensors = Given(*(x.to(half) for x in tensors))
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sinks": s_aux,
    }
    # Handlers and their ops choose their own precision.
    without_autocast = torch.autocast(query.device.type, enabled=False) if mixed else nullcontext()
    if isinstance(cache, ContextParallelCache):
        with without_autocast:
            return attend_spread(call, cache, tensors, options).transpose(1, 2)
    if in_batch:
        with without_autocast:
            return attend_requests(call, tensors, others, window=sliding_window, **options).transpose(1, 2)
    # Of a static cache, which hands over its whole buffer, only the device knows how much is in use.
    held: Any = key.shape[2] if cache is None else cache.get_seq_length(layer)

    def used() -> tuple[Given, Padding | None]:
        """Return the tensors without a buffer's room, and their padding."""
        given, seen = tensors, None
        if capturing(key.device) and (isinstance(held, Tensor) or held < key.shape[2]):
            raise NotImplementedError(CAPTURE)
        if int(held) < key.shape[2]:
            seen = int(held)
            given = tensors._replace(k=tensors.k[:, :, :seen], v=tensors.v[:, :, :seen])
        return given, call.part_of.padding(mask, query.shape[2], given.k.shape[2], seen)

    lengths = None if sliding_window is not None else _step_lengths(call, query, mask, held)
    if lengths is None:
        given, padding = used()
        if padding is not None and not any(queries for queries, _ in padding.lengths):
            return torch.zeros_like(query).transpose(1, 2)
        if sliding_window is not None:
            attend = dense_attention if padding is None else padding.dense
            with without_autocast:
                out = attend(*given[:3], window=sliding_window, **options)
            return out.transpose(1, 2)
    after = held_of(cache, layer)
    # Quantised and offloaded caches give other tensors than they hold.
    after = after if after is not None and after.keys is key else None
    shared: dict[str, Any] = {
        "layer": layer,
        **options,
        "summaries": summaries_of(cache).setdefault(layer, Growing()),
        "cached": Cached(call.before, after, key.shape[2] if isinstance(held, Tensor) else None),
        "chosen": call.part_of.chosen[0].setdefault(0, {}),
    }

    def whole() -> AttentionCall:
        given, padding = used()
        return AttentionCall(
            given=given,
            rows=Rows.last(query.shape[2], given.k.shape[2]) if padding is None else padding.rows,
            padding=padding,
            position_ids=call.given.get("position_ids"),
            prompt_tokens=call.part_of.mode.prompt_tokens,
            **shared,
        )

    with without_autocast:
        if lengths is not None:
            step = Step(given=tensors, lengths=lengths, call=whole, **shared)
            return handler.step(step).transpose(1, 2)  # type: ignore[attr-defined]
        inputs = whole()
        return inputs.unpacked(handler(inputs)).transpose(1, 2)


def _refuse_call(call: LayerCall, dropout: float, is_causal: bool | None, others: dict[str, Any]) -> None:
    """Refuse what attention is asked for and attached models do not do."""
    if dropout:
        raise NotImplementedError(f"attention dropout ({dropout}) is not supported; {DROPOUT}")
    if not (is_causal or (is_causal is None and call.taps.attention.is_causal)):
        raise NotImplementedError(f"is_causal=False is not supported; {CAUSAL}")
    known = _NOT_ATTENTION if call.part_of.mode.prompts is None else _NOT_ATTENTION | BATCH
    if unknown := sorted(n for n, value in others.items() if value is not None and n not in known):
        raise NotImplementedError(f"attention is asked for {', '.join(unknown)}; {UNKNOWN}")


def _check_given(call: LayerCall, given: Given) -> None:
    """Refuse tensors that do not belong together, as of a model that is not as its family's file says."""
    (query, key, _, q_nope, k_nope), layer = given, call.taps.layer
    if q_nope.shape != query.shape or k_nope.shape[1::2] != key.shape[1::2]:
        raise RuntimeError(
            f"layer {layer} has q {list(query.shape)} and k {list(key.shape)} after RoPE, but before it "
            f"{list(q_nope.shape)} and {list(k_nope.shape)}, with transformers {host_version}; its family's "
            "file does not fit"
        )
    if cache_of(call.given) is None and key.shape[2] != k_nope.shape[2]:
        raise RuntimeError(
            f"layer {layer} attends to {key.shape[2]} keys, {k_nope.shape[2]} of them new, and was "
            f"given no KV cache, only {', '.join(call.given)}, by transformers {host_version}; {CACHE}"
        )


def _step_lengths(call: LayerCall, query: Tensor, mask: Tensor | None, held: int | Tensor) -> Lengths | None:
    """Return how long the sequences are if a call is a step of decoding that a `SparseLayer` computes."""
    mode, new = call.part_of.mode, query.shape[2]
    if not isinstance(mode.handler, SparseLayer) or not mode.handler.steps(call.taps.layer, new):
        return None
    if mode.prompt_tokens is not None or query.requires_grad:
        return None
    # A short prompt is none, unless only the device knows that nothing came before: it reads its own block.
    if not isinstance(held, Tensor) and held == new:
        return None
    return call.part_of.lengths(mask, new, held, batch=len(query), device=query.device)


@torch.compiler.disable(reason=FULLGRAPH)
def padding_mask(*, config: Any, attention_mask: Tensor | None, kv_length: int, **inputs: Any) -> Any:
    """Mask function for transformers: which keys are real, ``[B, Tk]``, or None."""
    if not hasattr(config, "seerattention_switch"):
        raise ValueError(
            f"attn_implementation={NAME!r} is what attach(model, gates, policy) asks for; leave it out"
        )
    now = running()
    begun, switch = now.part_of if isinstance(now, LayerCall) else now, config.seerattention_switch
    if begun is not None and begun.switch is switch and begun.mode.handler is not None:
        if begun.mode.prompts is not None:
            return None
        # What transformers says of any mask that is more, or less, than causal; one token sees all keys.
        if not inputs["allow_is_causal_skip"] and inputs["q_length"] > 1:
            raise NotImplementedError(f"the model asks for {inputs['mask_function'].__qualname__}; {CAUSAL}")
        if attention_mask is None:
            return None
        if (gone := attention_mask.shape[1] - kv_length) > 0:
            # A sliding window's cache drops columns, and padding takes the place of tokens in it.
            new = inputs["q_length"]
            old, kept, now_read = attention_mask.bool().split((gone, kv_length - new, new), 1)
            if bool((old.any(1) & ~kept.all(1) & now_read.any(1)).any()):
                raise NotImplementedError(SLIDING)
        return attention_mask[:, -kv_length:]
    inputs |= {"config": config, "attention_mask": attention_mask, "kv_length": kv_length}
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation_internal)
    return None if function is None else function(**inputs)


def refuse(decoder: Any, given: dict[str, Any]) -> None:
    """Refuse what attached models cannot do, before any work."""
    if given.get("output_attentions", decoder.config.output_attentions):
        raise ValueError(MAPS)
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(tokens := given.get(name), Tensor) and tokens.numel() == 0:
            raise ValueError(f"empty prompt: {name} is {list(tokens.shape)}; give at least one token")
    positions = given.get("position_ids")
    if isinstance(cache := cache_of(given), ContextParallelCache):
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        assert tokens is not None
        cache.check_places(tokens.shape[1], positions, given.get("attention_mask"))
        return
    if positions is None or given.get("attention_mask") is not None or capturing(positions.device):
        return
    if paged(given):
        return
    # Nothing jumps in a single token, and a step of decoding does not wait for the device.
    if positions.shape[-1] > 1:
        jumps = (positions.diff(dim=-1) != 1).nonzero()
        if len(jumps):
            raise NotImplementedError(f"position_ids jump after token {int(jumps[0, -1])}: {PACKED}")
