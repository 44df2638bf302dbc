"""Attach gates or any other handler to a model's attention layers, and take them off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from seerattention.attention import seer_attention
from seerattention.cache import KeySummaries
from seerattention.gate import Scorer
from seerattention.models._call import AttentionCall, Handler, dense_attention, real_tokens
from seerattention.models._family import family_of, full_attention_layers
from seerattention.models._gates import BaseInfo, Gates, head_dim_of
from seerattention.policies import Policy, parse
from seerattention.selection import BlockSelection

#: Name under which the attention function is registered with transformers.
NAME = "seerattention"

#: Tokens below which prefill is dense because selection costs more than it saves, per device type;
#: measurements in docs/kernels.md.
DENSE_BELOW = {"cpu": 2048, "cuda": 16384}

#: Called after every sparse layer with its inputs and the blocks that were read.
Observer = Callable[[int, AttentionCall, BlockSelection], None]


class _Tap:
    """What one attention module hands over during a call: q and k before RoPE, and its KV cache."""

    def __init__(self, runtime: _Runtime, layer: int, head_dim: int) -> None:
        self.runtime = runtime
        self.layer = layer
        self.head_dim = head_dim
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.cache: Any = None

    def keep(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """Return a forward hook that keeps a module's output as ``[B, H, T, D]``."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            heads_last = output if output.dim() == 4 else output.unflatten(-1, (-1, self.head_dim))
            setattr(self, name, heads_last.transpose(1, 2))

        return hook

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
    sparse: _SparsePrefill | None = None


def _runtime(model: nn.Module) -> _Runtime | None:
    return model.__dict__.get("_seerattention_runtime")


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: queries and keys after RoPE, ``[B, H, T, D]``."""
    if dropout:
        raise NotImplementedError(
            f"attention dropout ({dropout}) is not supported; set attention_dropout=0 or call model.eval()"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tap: _Tap | None = module.__dict__.get("_seerattention_tap")
    if tap is None:
        rows = real_tokens(attention_mask, query.shape[2])
        compute = lambda q, k, v: dense_attention(q, k, v, scale=scale, window=sliding_window)  # noqa: E731
        return _by_row(rows, query, key, value, compute).transpose(1, 2), None
    q_nope, k_nope, cache = tap.take()
    if cache is not None and (seen := int(cache.get_seq_length(tap.layer))) < key.shape[2]:
        # A static cache hands over its whole buffer.
        key, value = key[:, :, :seen], value[:, :, :seen]
        attention_mask = None if attention_mask is None else attention_mask[:, :seen]
    rows = real_tokens(attention_mask, query.shape[2])
    handler = tap.runtime.handler
    if isinstance(handler, _SparsePrefill):
        handler.use_cache(cache)

    def call(q: Tensor, k: Tensor, v: Tensor, qn: Tensor, kn: Tensor, slot: int | None) -> Tensor:
        past = k.shape[2] - q.shape[2]
        positions = torch.arange(past, k.shape[2], device=q.device)
        return handler(AttentionCall(tap.layer, q, k, v, qn, kn, positions, scale, slot))

    if rows is None:
        return call(query, key, value, q_nope, k_nope, None).transpose(1, 2), None
    out = torch.zeros_like(query)
    for b, (of_q, of_k) in enumerate(rows):
        if of_q.numel():
            one = slice(b, b + 1)
            q, qn, kn = query[one][:, :, of_q], q_nope[one][:, :, of_q], k_nope[one][:, :, of_q]
            out[one, :, of_q] = call(q, key[one][:, :, of_k], value[one][:, :, of_k], qn, kn, b)
    return out.transpose(1, 2), None


def _by_row(
    rows: list[tuple[Tensor, Tensor]] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Compute attention over the real tokens of each row; padding gets zeros."""
    if rows is None:
        return compute(query, key, value)
    out = torch.zeros_like(query)
    for b, (of_q, of_k) in enumerate(rows):
        if of_q.numel():
            one = slice(b, b + 1)
            out[one, :, of_q] = compute(query[one][:, :, of_q], key[one][:, :, of_k], value[one][:, :, of_k])
    return out


class _SparsePrefill:
    """The handler that `attach` installs: sparse prefill, dense decoding."""

    def __init__(
        self,
        scorers: dict[int, Scorer],
        policy: Policy,
        backend: str,
        min_tokens: int | None,
        observe: Observer | None,
    ) -> None:
        self.scorers = scorers
        self.policy = policy
        self.backend = backend
        self.min_tokens = min_tokens
        self.observe = observe
        self.usage: Counter[str] = Counter()
        self._summaries: dict[tuple[int, int | None], KeySummaries] | None = None

    def use_cache(self, cache: Any) -> None:
        """Keep summaries with this KV cache: copies of the cache copy them along."""
        if cache is None:
            self._summaries = None
            return
        if not hasattr(cache, "seerattention_summaries"):
            cache.seerattention_summaries = {}
        self._summaries = cache.seerattention_summaries

    def __call__(self, call: AttentionCall) -> Tensor:
        scorer = self.scorers[call.layer]
        summaries = self._update_summaries(call, scorer)
        reason = self._why_dense(call, scorer, summaries)
        self.usage[reason or "sparse"] += 1
        if reason:
            return dense_attention(call.q, call.k, call.v, scale=call.scale)
        if scorer.after_rope:
            positions = torch.arange(call.k.shape[2], device=call.k.device)
            k_blocks = scorer.compress(call.k, positions=positions)
        else:
            assert summaries is not None
            k_blocks = summaries.all()
        out, selection = seer_attention(
            call.q,
            call.k,
            call.v,
            scorer,
            self.policy,
            q_scored=call.q if scorer.after_rope else call.q_nope,
            k_blocks=k_blocks,
            positions=call.positions,
            scale=call.scale,
            backend=self.backend,
        )
        if self.observe is not None:
            self.observe(call.layer, call, selection)
        return out

    def _why_dense(self, call: AttentionCall, scorer: Scorer, summaries: KeySummaries | None) -> str | None:
        """Return why this call is computed densely, or None."""
        new, total = call.q.shape[2], call.k.shape[2]
        least = self.min_tokens
        if least is None:
            least = DENSE_BELOW.get(call.q.device.type, 0)
        if new == 1 and total > 1:
            return "dense: decoding step"
        if total < least:
            return f"dense: fewer than {least} tokens"
        if summaries is None and not scorer.after_rope:
            return "dense: the KV cache was changed from outside, block summaries no longer match it"
        return None

    def _update_summaries(self, call: AttentionCall, scorer: Scorer) -> KeySummaries | None:
        """Add this call's keys to the summaries; None if they do not belong to the cached keys."""
        if scorer.after_rope:
            return None
        past = call.k.shape[2] - call.q.shape[2]
        key = (call.layer, call.slot)
        store = {} if self._summaries is None else self._summaries
        summaries = store.get(key)
        if summaries is None or summaries.scorer is not scorer:
            summaries = KeySummaries(scorer)
        if not summaries.matches(call.k[:, :, :past]):
            store.pop(key, None)
            return None
        summaries.extend(call.k_nope, call.k[:, :, past:])
        store[key] = summaries
        return summaries


def _refuse(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the model: refuse what attached models cannot do, before any work."""
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions needs the whole attention map, which sparse attention never computes; "
            "detach(model) and load it with attn_implementation='eager' for that"
        )
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(tokens, Tensor) and tokens.numel() == 0:
        raise ValueError(f"empty prompt: input_ids is {list(tokens.shape)}; give at least one token")


def _install(model: PreTrainedModel, handler: Handler) -> _Runtime:
    family = family_of(model)
    layers = full_attention_layers(model)
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    runtime = _Runtime(handler, model.config._attn_implementation)
    head_dim = head_dim_of(model.config.get_text_config())
    for index, attention in layers.items():
        tap = _Tap(runtime, index, head_dim)
        q, k = family.taps(attention)
        runtime.hooks += [
            q.register_forward_hook(tap.keep("q")),
            k.register_forward_hook(tap.keep("k")),
            attention.register_forward_pre_hook(tap.before, with_kwargs=True),
        ]
        attention.__dict__["_seerattention_tap"] = tap
        runtime.modules.append(attention)
    runtime.hooks.append(model.register_forward_pre_hook(_refuse, with_kwargs=True))
    model.set_attn_implementation(NAME)
    model.__dict__["_seerattention_runtime"] = runtime
    return runtime


def _uninstall(model: PreTrainedModel) -> None:
    runtime = model.__dict__.pop("_seerattention_runtime")
    for hook in runtime.hooks:
        hook.remove()
    for attention in runtime.modules:
        del attention.__dict__["_seerattention_tap"]
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
        min_tokens: Sequences shorter than this are computed densely; default measured per device
            (``DENSE_BELOW``). 0 makes every prefill sparse.
        observe: Called after every sparse layer with (layer, `AttentionCall`, `BlockSelection`).
        check_base: Refuse gates whose base model's weights differ. Shapes are always checked.

    Returns:
        The same model.

    Raises:
        NotImplementedError: If the model's family has no file.
        ValueError: If the gates are for another model, or there is no policy.
    """
    family_of(model)
    layers = full_attention_layers(model)
    if isinstance(policy, str):
        policy = parse(policy)
    if isinstance(scorers, Gates):
        _check_gates(model, scorers, list(layers), check_base)
        policy = policy or (parse(scorers.policy) if scorers.policy else None)
        by_layer: dict[int, Scorer] = dict(scorers.items())
    else:
        by_layer = dict.fromkeys(layers, scorers)
    if policy is None:
        raise ValueError('these gates were saved without a policy; pass one, e.g. policy="top_k:0.1"')
    if _runtime(model) is not None:
        _uninstall(model)
    sparse = _SparsePrefill(by_layer, policy, backend, min_tokens, observe)
    runtime = _install(model, sparse)
    runtime.sparse = sparse
    if isinstance(scorers, Gates):
        scorers.use_rotary_of(model)
        for index, gate in scorers.items():
            layers[index].attn_gate = gate.to(next(layers[index].parameters()).device)
    return model


def _check_gates(model: PreTrainedModel, gates: Gates, layers: list[int], check_base: bool) -> None:
    actual = BaseInfo.of(model)
    if not check_base:
        actual = replace(actual, fingerprint=gates.base.fingerprint)
    if differences := gates.base.differences(actual):
        raise ValueError(
            f"these gates were made for {gates.base.name or 'an unnamed model'}, not for "
            f"{actual.name or 'this model'}: {'; '.join(differences)}. Load that model, or distil gates "
            "for this one; a fine-tuned variant may use them with check_base=False"
        )
    have = [index for index, _ in gates.items()]
    if have != layers:
        raise ValueError(f"these gates are for layers {have}; the model's full-attention layers are {layers}")


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take gates, hooks and attention function off again, leaving the model as it was.

    Raises:
        ValueError: If nothing is attached.
    """
    _sparse(model)
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


def _sparse(model: PreTrainedModel) -> _SparsePrefill:
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
