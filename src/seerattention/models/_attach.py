"""Attach gates or any other handler to a model's attention layers, and take them off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from seerattention.gate import Scorer
from seerattention.models._call import AttentionCall, Handler, dense_attention, real_tokens
from seerattention.models._family import Tap, attention_layers, family_of, full_attention_layers
from seerattention.models._gates import BaseInfo, Gates, head_dim_of, head_order
from seerattention.models._sparse import Observer, SparsePrefill
from seerattention.policies import Policy, parse

#: Name under which the attention function is registered with transformers.
NAME = "seerattention"


class _Taps:
    """What one attention module hands over during a call: q and k before RoPE, and its KV cache."""

    def __init__(
        self, runtime: _Runtime, layer: int, of_q: Tap, of_k: Tap, head_dim: int, order: Tensor | None
    ) -> None:
        self.runtime = runtime
        self.layer = layer
        self.of_q = of_q
        self.of_k = of_k
        self.head_dim = head_dim
        self.order = order
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.cache: Any = None

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
            output = output.unflatten(-1, (-1, self.head_dim))
        if not tap.heads_first:
            output = output.transpose(1, 2)
        if self.order is None:
            return output
        if self.order.device != output.device:
            self.order = self.order.to(output.device)
        return output[..., self.order]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention module: remember its KV cache."""
        self.cache = kwargs.get("past_key_values")

    def take(self) -> tuple[Tensor, Tensor, Any]:
        """Return and forget q, k before RoPE and the cache of this call."""
        assert self.q is not None, "the family's taps did not run"
        assert self.k is not None, "the family's taps did not run"
        taken = self.q, self.k, self.cache
        self.q = self.k = self.cache = None
        return taken


@dataclass
class _Runtime:
    """What is attached to one model."""

    handler: Handler
    previous_attention: str | None
    hooks: list[Any] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    sparse: SparsePrefill | None = None


def _runtime(model: nn.Module) -> _Runtime | None:
    return model.__dict__.get("_seerattention_runtime")


def _idle_runtime(model: nn.Module) -> _Runtime | None:
    """Return what is attached, refusing while a handler stands in for it."""
    runtime = _runtime(model)
    if runtime is not None and runtime.handler is not runtime.sparse:
        raise ValueError("this model's attention is intercepted; leave intercept(model, ...) first")
    return runtime


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
        raise NotImplementedError(
            f"attention dropout ({dropout}) is not supported; set attention_dropout=0 or call model.eval()"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    taps: _Taps = module.__dict__["_seerattention_taps"]
    q_nope, k_nope, cache = taps.take()
    if cache is not None and (seen := int(cache.get_seq_length(taps.layer))) < key.shape[2]:
        # A static cache hands over its whole buffer.
        key, value = key[:, :, :seen], value[:, :, :seen]
        attention_mask = None if attention_mask is None else attention_mask[:, :seen]

    def compute(q: Tensor, k: Tensor, v: Tensor, qn: Tensor, kn: Tensor, slot: int | None) -> Tensor:
        if sliding_window is not None:
            return dense_attention(q, k, v, scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
        positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        return taps.runtime.handler(
            AttentionCall(taps.layer, q, k, v, qn, kn, positions, scale, slot, cache, softcap, s_aux)
        )

    rows = real_tokens(attention_mask, query.shape[2], key.shape[2])
    if rows is None:
        return compute(query, key, value, q_nope, k_nope, None).transpose(1, 2), None
    out = torch.zeros_like(query)
    for b, (of_q, of_k) in enumerate(rows):
        if of_q.numel():
            one = slice(b, b + 1)
            q, qn, kn = (x[one][:, :, of_q] for x in (query, q_nope, k_nope))
            out[one, :, of_q] = compute(q, key[one][:, :, of_k], value[one][:, :, of_k], qn, kn, b)
    return out.transpose(1, 2), None


def _refuse(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the decoder: refuse what attached models cannot do, before any work."""
    if kwargs.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise ValueError(
            "output_attentions needs the whole attention map, which sparse attention never computes; "
            "detach(model) and load it with attn_implementation='eager' for that"
        )
    tokens = kwargs.get("input_ids", args[0] if args else None)
    for name, given in (("input_ids", tokens), ("inputs_embeds", kwargs.get("inputs_embeds"))):
        if isinstance(given, Tensor) and given.numel() == 0:
            raise ValueError(f"empty prompt: {name} is {list(given.shape)}; give at least one token")
    positions = kwargs.get("position_ids")
    if positions is not None and kwargs.get("attention_mask") is None:
        jumps = (positions.diff(dim=-1) != 1).nonzero()
        if len(jumps):
            raise NotImplementedError(
                f"position_ids jump after token {int(jumps[0, -1])}: sequences packed into one row are not "
                "supported, give them as a padded batch with an attention_mask"
            )


def _install(model: PreTrainedModel, handler: Handler) -> _Runtime:
    family = family_of(model)
    # Whatever can fail comes first, so that a failure leaves the model as it was.
    tapped = {i: (attention, *family.taps(attention)) for i, attention in attention_layers(model).items()}
    order = head_order(model)
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    runtime = _Runtime(handler, model.config._attn_implementation)
    head_dim = head_dim_of(model.config.get_text_config())
    model.set_attn_implementation(NAME)
    for index, (attention, q, k) in tapped.items():
        of_q, of_k = (tap if isinstance(tap, Tap) else Tap(tap) for tap in (q, k))
        taps = _Taps(runtime, index, of_q, of_k, head_dim, order)
        runtime.hooks += [
            of_q.module.register_forward_hook(taps.keep_q),
            of_k.module.register_forward_hook(taps.keep_k),
            attention.register_forward_pre_hook(taps.before, with_kwargs=True),
        ]
        attention.__dict__["_seerattention_taps"] = taps
        runtime.modules.append(attention)
    # The decoder, because it can be called without its head.
    runtime.hooks.append(model.get_decoder().register_forward_pre_hook(_refuse, with_kwargs=True))
    model.__dict__["_seerattention_runtime"] = runtime
    return runtime


def _uninstall(model: PreTrainedModel) -> None:
    runtime = model.__dict__.pop("_seerattention_runtime")
    for hook in runtime.hooks:
        hook.remove()
    for attention in runtime.modules:
        del attention.__dict__["_seerattention_taps"]
        if "attn_gate" in attention._modules:
            del attention.attn_gate
    model.set_attn_implementation(runtime.previous_attention)


def attached(model: PreTrainedModel) -> bool:
    """Whether gates or a scorer are attached to the model."""
    runtime = _runtime(model)
    return runtime is not None and runtime.sparse is not None


def attach(
    model: PreTrainedModel,
    scorers: Gates | Scorer,
    policy: Policy | str | None = None,
    *,
    backend: str = "auto",
    min_tokens: int | None = None,
    observe: Observer | None = None,
    check_base: bool = True,
) -> PreTrainedModel:
    """Make a model's prefill sparse; `detach` undoes it.

    Every layer with full attention reads only the blocks that its gate and the policy choose.
    Sliding-window layers and decoding steps stay dense. Attaching again replaces what was attached.

    Args:
        model: A transformers model of a supported family.
        scorers: `Gates`, which become the child modules ``self_attn.attn_gate``; or one scorer for
            every layer, such as a baseline.
        policy: How many blocks to read, as an object or text such as ``"top_k:0.1"``; default the one
            saved with the gates.
        backend: A backend of ``block_sparse_attention``.
        min_tokens: Sequences shorter than this are computed densely, all others sparsely; 0 makes every
            prefill sparse. By default what was measured on the device, or on the one most like it,
            decides by length and, where the policy knows it ahead, by density (`seerattention info`).
        observe: Called after every sparse layer with (layer, `AttentionCall`, `BlockSelection`).
        check_base: Refuse gates whose base model's weights differ or, for published gates, which hold
            nothing but its name, whose name does. Shapes are always checked.

    Returns:
        The same model.

    Raises:
        NotImplementedError: If the model's family has no file, or its layers or positions are of a kind
            that is not supported.
        TypeError: If ``scorers`` or ``policy`` is of another type.
        ValueError: If the gates are for another model, there is no policy or no full-attention layer, or
            the call is made inside `intercept`. The model stays as it was.
    """
    family_of(model)
    layers = full_attention_layers(model)
    if isinstance(policy, str):
        policy = parse(policy)
    if not isinstance(policy, Policy | None):
        raise TypeError(f'policy must be a Policy or text such as "top_k:0.1", got {policy!r}')
    if not isinstance(scorers, Gates) and not hasattr(scorers, "score"):
        raise TypeError(f"scorers must be Gates or a Scorer, got {scorers!r}; use load_gates(folder) first")
    if isinstance(scorers, Gates):
        _check_gates(model, scorers, list(layers), check_base)
        policy = policy or (parse(scorers.policy) if scorers.policy else None)
        by_layer: dict[int, Scorer] = dict(scorers.items())
    else:
        by_layer = dict.fromkeys(layers, scorers)
    if policy is None:
        raise ValueError('these gates were saved without a policy; pass one, e.g. policy="top_k:0.1"')
    if isinstance(scorers, Gates):
        scorers.use_rotary_of(model)
    if _idle_runtime(model) is not None:
        _uninstall(model)
    sparse = SparsePrefill(by_layer, policy, backend, min_tokens, observe)
    runtime = _install(model, sparse)
    runtime.sparse = sparse
    if isinstance(scorers, Gates):
        for index, gate in scorers.items():
            layers[index].attn_gate = gate.to(next(layers[index].parameters()).device)
    return model


def _check_gates(model: PreTrainedModel, gates: Gates, layers: list[int], check_base: bool) -> None:
    actual = BaseInfo.of(model)
    if differences := gates.base.differences(actual, identity=check_base):
        raise ValueError(
            f"these gates were made for {gates.base.name or 'an unnamed model'}, not for "
            f"{actual.name or 'this model'}: {'; '.join(differences)}. Load that model, or distil gates "
            "for this one; a fine-tuned variant may use them with check_base=False"
        )
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        if (made := getattr(gates.config, name)) != (needed := getattr(actual, name)):
            raise ValueError(
                f"these gates have {name}={made}, the model has {needed}; make them by new_gates"
            )
    have = [index for index, _ in gates.items()]
    if have != layers:
        raise ValueError(
            f"these gates are for layers {have}; the model's full-attention layers are {layers}; "
            "make them by new_gates"
        )


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take gates, hooks and attention function off again, leaving the model as it was.

    Raises:
        ValueError: If nothing is attached, or inside `intercept`.
    """
    _sparse(model)
    _idle_runtime(model)
    _uninstall(model)
    return model


def set_policy(model: PreTrainedModel, policy: Policy | str) -> None:
    """Change the policy of an attached model.

    Raises:
        ValueError: If nothing is attached or the text is not understood.
    """
    _sparse(model).policy = parse(policy) if isinstance(policy, str) else policy


def usage(model: PreTrainedModel) -> dict[str, int]:
    """Return how often a layer's attention ran sparse, or dense and why, since attaching.

    Raises:
        ValueError: If nothing is attached.
    """
    return dict(_sparse(model).usage)


def _sparse(model: PreTrainedModel) -> SparsePrefill:
    runtime = _runtime(model)
    if runtime is None or runtime.sparse is None:
        raise ValueError("nothing is attached to this model; call attach(model, gates, policy) first")
    return runtime.sparse


@contextmanager
def intercept(model: PreTrainedModel, handler: Handler) -> Iterator[PreTrainedModel]:
    """Let a handler compute the attention of every full-attention layer while the context lasts.

    Works on a plain model and on one with gates attached, whose handler it stands in for.

    Args:
        model: A transformers model of a supported family.
        handler: Called with an `AttentionCall`, returns the output ``[B, Hq, Tq, D]``.
    """
    runtime = _runtime(model)
    if runtime is not None:
        before, runtime.handler = runtime.handler, handler
        try:
            yield model
        finally:
            runtime.handler = before
        return
    _install(model, handler)
    try:
        yield model
    finally:
        _uninstall(model)
