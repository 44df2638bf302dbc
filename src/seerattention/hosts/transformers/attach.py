"""The life of gates on a model: attach, add, choose, switch off for a while, detach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from seerattention.engine.layer import Observer, Phase, SparseLayer
from seerattention.gate import Scorer
from seerattention.hosts.transformers.base import GATES, device_of, unwrapped
from seerattention.hosts.transformers.choice import Chosen, checked, first_of, set_policies
from seerattention.hosts.transformers.family import family_of, full_attention_layers
from seerattention.hosts.transformers.gates import Gates
from seerattention.hosts.transformers.intercept import (
    Runtime,
    idle_runtime,
    install,
    refuse_stand_in,
    runtime_of,
    uninstall,
)
from seerattention.hosts.transformers.rotary import Unrotate
from seerattention.hosts.transformers.support import PREFIXES
from seerattention.hosts.transformers.tensor_parallel import head_share
from seerattention.policies import Policy

#: What `attach` returns is what it was given: a model, compiled or wrapped by PEFT or not.
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Owner:
    """What `attach` keeps on a model."""

    sets: dict[str, Chosen]
    active: str

    def used_by(self, model: PreTrainedModel | None) -> None:
        """Tell the gates which model they are attached to, if any."""
        for gates in (gates for one in self.sets.values() for gates in one.gates):
            gates.used_by(model)


def attached(model: nn.Module) -> bool:
    """Whether gates or a scorer are attached to the model."""
    runtime = runtime_of(unwrapped(model))
    return runtime is not None and runtime.owner is not None


def attach(
    model: Model,
    scorers: Gates | Scorer,
    policy: Policy | str | None = None,
    *,
    prefill: Policy | str | None = None,
    decode: Policy | str | None = None,
    decode_gates: Gates | Scorer | None = None,
    name: str = "default",
    backend: str = "auto",
    min_tokens: int | None = None,
    observe: Observer | None = None,
    check_base: bool = True,
) -> Model:
    """Make a model's prefill sparse, its decoding, or both; `detach` undoes it.

    Every layer with full attention reads only the blocks that its gate and a policy choose: in prefill for
    each block of queries, in decoding for each token. A call of fewer tokens than a block after earlier ones
    is a step of decoding. Sliding-window layers stay dense. Attaching again replaces everything that was
    attached; `add_gates` adds, `set_gates` and `set_policy` change what is.

    Args:
        model: A transformers model of a supported family, also compiled or wrapped by PEFT, DDP, FSDP or
            Accelerate; adapters and wrappers may come before or after. Where tensor parallelism spread it
            over processes, all of them attach the same gates, and each chooses for its own heads.
        scorers: `Gates`, which become the child modules ``self_attn.attn_gate`` and ask for no gradient
            while they are; or one scorer for every layer, such as a baseline.
        policy: The same as ``prefill``.
        prefill: How many blocks to read in prefill, as an object or text such as ``"top_k:0.1"``, or
            ``"dense"``; default what was saved with the gates or, of gates for decoding alone, dense.
        decode: The same for decoding, such as ``"token_budget:4096"``; default what was saved with the gates
            that choose there, or dense.
        decode_gates: What chooses in decoding; default ``scorers``. Gates become the child modules
            ``self_attn.decode_gate``.
        name: What `set_gates` calls these gates.
        backend: A backend of ``block_sparse_attention``; to train the model itself, ``"reference"``,
            which has a backward pass.
        min_tokens: Sequences shorter than this are computed densely, all others sparsely; 0 makes everything
            sparse. In decoding a batch's longest sequence counts, and in a static cache none is short, since
            only the device knows. By default what was measured on the device, or on the one most like it,
            decides by length and, where the policy knows it ahead, by density (`seerattention info`).
        observe: Called after every sparse layer with (layer, `AttentionCall`, `BlockSelection`), but not
            while a graph is captured.
        check_base: Refuse gates whose base model's weights differ or, for published gates, which hold
            nothing but its name, whose name does. Shapes are always checked.

    Returns:
        The same model.

    Raises:
        NotImplementedError: If the model's family has no file, its layers or positions are of a kind that is
            not supported, or its heads are spread over processes in a way that is not.
        TypeError: If ``model``, scorers or a policy is of another type.
        ValueError: If gates are for another model or not for the phase, there is no policy or one that makes
            no sense in decoding, no full-attention layer, the backend is unknown, or the call is made inside
            `intercept` or `dense`. The model stays as it was.
    """
    base = unwrapped(model)
    family_of(base)
    _refuse(model, base)
    new = checked(base, scorers, decode_gates, first_of(policy, prefill), decode, check_base)
    idle = Phase({}, None)
    layer = SparseLayer(idle, idle, Unrotate(base), backend, min_tokens, observe)
    if idle_runtime(base) is not None:
        detach(base)
    runtime = install(base, layer)
    runtime.owner = _Owner({name: new}, name)
    runtime.owner.used_by(base)
    _activate(base, runtime, name)
    return model


def _refuse(model: nn.Module, base: PreTrainedModel) -> None:
    """Refuse bases whose layers hold other keys than gates are made for, or parts of heads."""
    adapters = getattr(model, "peft_config", None) or {}
    if any(config.peft_type == "PREFIX_TUNING" for config in adapters.values()):
        raise NotImplementedError(PREFIXES)
    head_share(base)


def _activate(model: PreTrainedModel, runtime: Runtime, name: str) -> None:
    """Make a set of scorers the one that is used; gates show as `GATES`."""
    runtime.owner.active = name
    chosen, layers, share = runtime.owner.sets[name], full_attention_layers(model), head_share(model)
    _remove_gates(layers)
    phases: list[Phase] = []
    policies = share.policy(chosen.policy), share.policy(chosen.decode_policy)
    for child, scorers, policy in zip(GATES, (chosen.scorers, chosen.decoders), policies, strict=True):
        if phases and chosen.decoders is chosen.scorers:
            phases.append(replace(phases[0], policy=policy))
            continue
        if not isinstance(scorers, Gates):
            alike: Any = dict.fromkeys(layers, scorers)
            phases.append(Phase(alike, policy))
            continue
        # What is saved later is whole, whatever part of it is in use here.
        parts = {index: share.gate(gate) for index, gate in scorers.items()}
        phases.append(Phase(parts, policy, scorers.reach, scorers.shared(layers)))
        for index, gate in parts.items():
            if device_of(gate) != (device := device_of(layers[index])):
                gate.to(device)
            # Nothing passes a gradient to gates in use. Whoever trains the model itself, over several
            # processes too, need not know of them.
            setattr(layers[index], child, gate.requires_grad_(False))
    prefill, decode = phases
    # Passes that began before end as they began.
    runtime.switch.handler = replace(sparse_layer(model), prefill=prefill, decode=decode)


def _remove_gates(layers: dict[int, nn.Module]) -> None:
    for attention in layers.values():
        for name in GATES:
            if name in attention._modules:
                getattr(attention, name).requires_grad_(True)
                delattr(attention, name)


def detach(model: Model) -> Model:
    """Take gates, hooks and attention function off again, leaving the model as it was.

    Raises:
        ValueError: If nothing is attached, inside `intercept` or `dense`, or while a manager of continuous
            batching runs.
    """
    base = unwrapped(model)
    owner = _attached(base).owner
    idle_runtime(base)
    owner.used_by(None)
    _remove_gates(full_attention_layers(base))
    uninstall(base)
    return model


def add_gates(
    model: nn.Module,
    name: str,
    scorers: Gates | Scorer,
    policy: Policy | str | None = None,
    *,
    prefill: Policy | str | None = None,
    decode: Policy | str | None = None,
    decode_gates: Gates | Scorer | None = None,
    check_base: bool = True,
) -> None:
    """Give an attached model further gates, to be chosen by `set_gates`.

    Args:
        model: A model with something attached.
        name: What to call them.
        scorers: Gates, or one scorer for every layer, such as a baseline.
        policy: The same as ``prefill``.
        prefill: The policy to use with them in prefill; default the one saved with them or else the current
            one.
        decode: The same for decoding.
        decode_gates: See `attach`.
        check_base: See `attach`.

    Raises:
        TypeError: If ``scorers`` or ``policy`` is of another type.
        ValueError: If nothing is attached, the name is taken, or the gates are for another model.
    """
    base = unwrapped(model)
    owner = _attached(base).owner
    if name in owner.sets:
        raise ValueError(f"there are gates named {name!r} already; choose another name")
    prefill, current = first_of(policy, prefill), owner.sets[owner.active]
    owner.sets[name] = checked(base, scorers, decode_gates, prefill, decode, check_base, current)
    owner.used_by(base)


def set_gates(model: nn.Module, name: str) -> None:
    """Use the gates of this name from now on, with their policies.

    Prompts whose beginning is cached go on: what the new gates need to know of it is made from the cache.

    Raises:
        ValueError: If nothing is attached or no gates have this name.
    """
    base = unwrapped(model)
    runtime = _attached(base)
    if name not in (sets := runtime.owner.sets):
        raise ValueError(f"there are no gates named {name!r}; there are {', '.join(map(repr, sets))}")
    _activate(base, runtime, name)


def set_policy(
    model: nn.Module,
    policy: Policy | str | None = None,
    *,
    prefill: Policy | str | None = None,
    decode: Policy | str | None = None,
) -> None:
    """Change policies of the gates in use.

    Args:
        model: A model with something attached.
        policy: The same as ``prefill``.
        prefill: For prefill, ``"dense"`` for none; what is not given stays.
        decode: The same for decoding.

    Raises:
        TypeError: If a policy is of another type.
        ValueError: If nothing is attached, the text is not understood, the gates are not for that phase, or a
            policy makes no sense in decoding. Then nothing changes.
    """
    base = unwrapped(model)
    runtime = _attached(base)
    current, prefill = runtime.owner.sets[runtime.owner.active], first_of(policy, prefill)
    if prefill is None and decode is None:
        raise ValueError('no policy is given; pass one, e.g. policy="top_k:0.1" or decode="dense"')
    set_policies(
        current,
        current.policy if prefill is None else prefill,
        current.decode_policy if decode is None else decode,
    )
    layer, share = sparse_layer(base), head_share(base)
    prefilling = replace(layer.prefill, policy=share.policy(current.policy))
    decoding = replace(layer.decode, policy=share.policy(current.decode_policy))
    runtime.switch.handler = replace(layer, prefill=prefilling, decode=decoding)


class Usage(dict[str, int]):
    """How often a layer's attention ran sparse, or dense and why.

    Attributes:
        short: Sentences that say which prompts were too short for the density that a policy asks for, and
            what was read of them instead.
    """

    def __init__(self, counts: Mapping[str, int], short: Iterable[str] = ()) -> None:
        super().__init__(counts)
        self.short = tuple(short)

    def __repr__(self) -> str:
        return "; ".join([super().__repr__(), *(f"too short: {why}" for why in self.short)])


def usage(model: nn.Module) -> Usage:
    """Return how often a layer's attention ran sparse, or dense and why, since attaching.

    Raises:
        ValueError: If nothing is attached.
    """
    layer = sparse_layer(model)
    return Usage(layer.usage, layer.short.values())


@contextmanager
def dense(model: Model) -> Iterator[Model]:
    """Give an attached model its own attention back while the context lasts: what `detach` would leave.

    Requests of other threads stay sparse meanwhile. A KV cache filled inside may be used outside: what the
    gates need is made from the cached keys.

    Raises:
        ValueError: If nothing is attached, or inside `intercept`.
    """
    switch = _attached(unwrapped(model)).switch
    if switch.mode.handler is not None:
        refuse_stand_in(switch)
    with switch.within(handler=None, stands_in=True):
        yield model


def active(model: nn.Module) -> Chosen:
    """Return what is in use."""
    owner = _attached(unwrapped(model)).owner
    return owner.sets[owner.active]


def sparse_layer(model: nn.Module) -> SparseLayer:
    """Return what computes an attached model's attention."""
    layer = _attached(unwrapped(model)).switch.handler
    assert isinstance(layer, SparseLayer)
    return layer


def prompt_of(model: nn.Module, tokens: int) -> AbstractContextManager[None]:
    """Tell an attached model the length of the prompt that this request gives it in pieces."""
    return _attached(unwrapped(model)).switch.within(prompt_tokens=tokens)


def _attached(model: nn.Module) -> Runtime:
    runtime = runtime_of(model)
    if runtime is None or runtime.owner is None:
        raise ValueError("nothing is attached to this model; call attach(model, gates, policy) first")
    return runtime
