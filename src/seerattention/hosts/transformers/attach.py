"""The life of gates on a model: attach, add, choose, switch off for a while, detach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from seerattention.engine.layer import Observer, SparseLayer
from seerattention.gate import Scorer
from seerattention.hosts.transformers.base import BaseInfo, device_of, unwrapped
from seerattention.hosts.transformers.family import family_of, full_attention_layers
from seerattention.hosts.transformers.gates import Gates, check_finite
from seerattention.hosts.transformers.intercept import (
    Runtime,
    idle_runtime,
    install,
    refuse_stand_in,
    runtime_of,
    uninstall,
)
from seerattention.hosts.transformers.rotary import Unrotate
from seerattention.hosts.transformers.support import PARALLEL, PREFIXES
from seerattention.policies import Policy, parse

#: What `attach` returns is what it was given: a model, compiled or wrapped by PEFT or not.
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _GateSet:
    """Scorers that can be chosen by name, and the policy they are used with."""

    scorers: Gates | Scorer
    policy: Policy


@dataclass
class _Owner:
    """What `attach` keeps on a model."""

    sets: dict[str, _GateSet]
    active: str

    def used_by(self, model: PreTrainedModel | None) -> None:
        """Tell the gates which model they are attached to, if any."""
        for one in self.sets.values():
            if isinstance(one.scorers, Gates):
                one.scorers.used_by(model)


def attached(model: nn.Module) -> bool:
    """Whether gates or a scorer are attached to the model."""
    runtime = runtime_of(unwrapped(model))
    return runtime is not None and runtime.owner is not None


def attach(
    model: Model,
    scorers: Gates | Scorer,
    policy: Policy | str | None = None,
    *,
    name: str = "default",
    backend: str = "auto",
    min_tokens: int | None = None,
    observe: Observer | None = None,
    check_base: bool = True,
) -> Model:
    """Make a model's prefill sparse; `detach` undoes it.

    Every layer with full attention reads only the blocks that its gate and the policy choose.
    Sliding-window layers and decoding steps stay dense. Attaching again replaces
    everything that was attached; `add_gates` adds, `set_gates` and `set_policy` change what is.

    Args:
        model: A transformers model of a supported family, also compiled or wrapped by PEFT, DDP, FSDP or
            Accelerate; adapters and wrappers may come before or after.
        scorers: `Gates`, which become the child modules ``self_attn.attn_gate`` and ask for no gradient
            while they are; or one scorer for every layer, such as a baseline.
        policy: How many blocks to read, as an object or text such as ``"top_k:0.1"``; default the one
            saved with the gates.
        name: What `set_gates` calls these gates.
        backend: A backend of ``block_sparse_attention``; to train the model itself, ``"reference"``,
            which has a backward pass.
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
        TypeError: If ``model``, ``scorers`` or ``policy`` is of another type.
        ValueError: If the gates are for another model, there is no policy or no full-attention layer, the
            backend is unknown, or the call is made inside `intercept` or `dense`. The model stays as it was.
    """
    base = unwrapped(model)
    family_of(base)
    _refuse(model, base)
    new = _checked(base, scorers, policy, check_base)
    layer = SparseLayer({}, new.policy, Unrotate(base), backend, min_tokens, observe)
    if idle_runtime(base) is not None:
        detach(base)
    runtime = install(base, layer)
    runtime.owner = _Owner({name: new}, name)
    runtime.owner.used_by(base)
    _activate(base, runtime, name)
    return model


def _refuse(model: nn.Module, base: PreTrainedModel) -> None:
    """Refuse bases whose layers hold other keys or heads than gates are made for."""
    adapters = getattr(model, "peft_config", None) or {}
    if any(config.peft_type == "PREFIX_TUNING" for config in adapters.values()):
        raise NotImplementedError(PREFIXES)
    if (base.tp_size or 1) > 1:
        raise NotImplementedError(PARALLEL)


def _checked(
    model: PreTrainedModel, scorers: Gates | Scorer, policy: Policy | str | None, check_base: bool
) -> _GateSet:
    """Return scorers and policy once they are known to fit the model."""
    layers = list(full_attention_layers(model))
    if not isinstance(scorers, Gates) and not hasattr(scorers, "score"):
        raise TypeError(f"scorers must be Gates or a Scorer, got {scorers!r}; use load_gates(folder) first")
    if isinstance(scorers, Gates):
        _check_gates(model, scorers, layers, check_base)
        policy = policy or scorers.policy
    if policy is None:
        raise ValueError('these gates were saved without a policy; pass one, e.g. policy="top_k:0.1"')
    checked = _GateSet(scorers, _policy(policy, scorers))
    if isinstance(scorers, Gates):
        scorers.use_rotary_of(model)
    return checked


def _policy(policy: Policy | str, scorers: Gates | Scorer) -> Policy:
    if isinstance(policy, str):
        return parse(policy, scorers.calibration if isinstance(scorers, Gates) else None)
    if not isinstance(policy, Policy):
        raise TypeError(f'policy must be a Policy or text such as "top_k:0.1", got {policy!r}')
    return policy


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
    check_finite(gates.named_weights())
    have = [index for index, _ in gates.items()]
    if have != layers:
        raise ValueError(
            f"these gates are for layers {have}; the model's full-attention layers are {layers}; "
            "make them by new_gates"
        )


def _activate(model: PreTrainedModel, runtime: Runtime, name: str) -> None:
    """Make a set of gates the one that is used and that shows as ``self_attn.attn_gate``."""
    runtime.owner.active = name
    chosen, layers = runtime.owner.sets[name], full_attention_layers(model)
    _remove_gates(layers)
    scorers = dict.fromkeys(layers, chosen.scorers)
    if isinstance(chosen.scorers, Gates):
        scorers = dict(chosen.scorers.items())
        for index, gate in scorers.items():
            if device_of(gate) != (device := device_of(layers[index])):
                gate.to(device)
            # Nothing passes a gradient to gates in use. Whoever trains the model itself, over several
            # processes too, need not know of them.
            layers[index].attn_gate = gate.requires_grad_(False)
    # Passes that began before end as they began.
    runtime.switch.handler = replace(sparse_layer(model), scorers=scorers, policy=chosen.policy)


def _remove_gates(layers: dict[int, nn.Module]) -> None:
    for attention in layers.values():
        if "attn_gate" in attention._modules:
            attention.attn_gate.requires_grad_(True)
            del attention.attn_gate


def detach(model: Model) -> Model:
    """Take gates, hooks and attention function off again, leaving the model as it was.

    Raises:
        ValueError: If nothing is attached, or inside `intercept` or `dense`.
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
    check_base: bool = True,
) -> None:
    """Give an attached model further gates, to be chosen by `set_gates`.

    Args:
        model: A model with something attached.
        name: What to call them.
        scorers: Gates, or one scorer for every layer, such as a baseline.
        policy: The policy to use with them; default the one saved with them or else the current one.
        check_base: See `attach`.

    Raises:
        TypeError: If ``scorers`` or ``policy`` is of another type.
        ValueError: If nothing is attached, the name is taken, or the gates are for another model.
    """
    base = unwrapped(model)
    owner = _attached(base).owner
    if name in owner.sets:
        raise ValueError(f"there are gates named {name!r} already; choose another name")
    saved = scorers.policy if isinstance(scorers, Gates) else None
    owner.sets[name] = _checked(base, scorers, policy or saved or sparse_layer(base).policy, check_base)
    owner.used_by(base)


def set_gates(model: nn.Module, name: str) -> None:
    """Use the gates of this name from now on, with their policy.

    Prompts whose beginning is cached go on: what the new gates need to know of it is made from the cache.

    Raises:
        ValueError: If nothing is attached or no gates have this name.
    """
    base = unwrapped(model)
    runtime = _attached(base)
    if name not in (sets := runtime.owner.sets):
        raise ValueError(f"there are no gates named {name!r}; there are {', '.join(map(repr, sets))}")
    _activate(base, runtime, name)


def set_policy(model: nn.Module, policy: Policy | str) -> None:
    """Change the policy of the gates in use.

    Raises:
        TypeError: If ``policy`` is of another type.
        ValueError: If nothing is attached or the text is not understood.
    """
    runtime = _attached(unwrapped(model))
    current = runtime.owner.sets[runtime.owner.active]
    current.policy = _policy(policy, current.scorers)
    runtime.switch.handler = replace(sparse_layer(model), policy=current.policy)


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


def active_gates(model: nn.Module) -> tuple[Gates | Scorer, Policy]:
    """Return the gates in use and their policy."""
    owner = _attached(unwrapped(model)).owner
    return owner.sets[owner.active].scorers, owner.sets[owner.active].policy


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
