"""What chooses blocks on a model: scorers and a policy for each phase, checked before anything changes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from seerattention.gate import Scorer
from seerattention.hosts.transformers.base import BaseInfo
from seerattention.hosts.transformers.family import full_attention_layers
from seerattention.hosts.transformers.gates import Gates, check_finite
from seerattention.policies import Policy, check_decodes, parse

#: Asks for dense attention in place of a policy.
DENSE = "dense"

#: Why gates are not used for prompts.
_DECODE_ALONE = (
    "these gates were taught for decoding alone; leave the policy for prefill out, or give gates for prefill "
    "and these as decode_gates"
)


@dataclass
class Chosen:
    """Scorers that can be chosen by name, and the policies that they are used with.

    Attributes:
        scorers: For prefill and, unless there are others, for decoding.
        decoders: For decoding.
        policy: For prefill, None where that is dense.
        decode_policy: For decoding, None where that is dense.
    """

    scorers: Gates | Scorer
    decoders: Gates | Scorer
    policy: Policy | None
    decode_policy: Policy | None

    @property
    def gates(self) -> list[Gates]:
        """The gates among the scorers."""
        both = [self.scorers] if self.decoders is self.scorers else [self.scorers, self.decoders]
        return [one for one in both if isinstance(one, Gates)]


def first_of(policy: Policy | str | None, prefill: Policy | str | None) -> Policy | str | None:
    """Return the policy for prefill, which can be given by its place or by its name."""
    if policy is not None and prefill is not None:
        raise ValueError("policy is prefill's, which is given too; leave one of them out")
    return prefill if policy is None else policy


def checked(
    model: PreTrainedModel,
    scorers: Gates | Scorer,
    decoders: Gates | Scorer | None,
    prefill: Policy | str | None,
    decode: Policy | str | None,
    check_base: bool,
    current: Chosen | None = None,
) -> Chosen:
    """Return scorers and policies once they are known to fit the model.

    A policy that is not given is the one saved with the gates or else the one of what is in use, if they are
    for that phase.
    """
    layers = list(full_attention_layers(model))
    decoders = scorers if decoders is None else decoders
    for one in (scorers, decoders):
        if not isinstance(one, Gates) and not hasattr(one, "score"):
            raise TypeError(f"scorers must be Gates or a Scorer, got {one!r}; use load_gates(folder) first")
    found = Chosen(scorers, decoders, None, None)
    for gates in found.gates:
        _check_gates(model, gates, layers, check_base)
    if prefill is None and _serves(scorers, "prefill"):
        prefill = (scorers.policy if isinstance(scorers, Gates) else None) or (current and current.policy)
    if decode is None and _serves(decoders, "decode"):
        decode = (decoders.decode_policy if isinstance(decoders, Gates) else None) or (
            current and current.decode_policy
        )
    if decode is None and decoders is not scorers:
        raise ValueError('decode_gates choose in decoding; say how much, e.g. decode="token_budget:4096"')
    set_policies(found, prefill, decode)
    for gates in found.gates:
        gates.use_rotary_of(model)
    return found


def set_policies(chosen: Chosen, prefill: Policy | str | None, decode: Policy | str | None) -> None:
    """Change the policies of scorers, None or "dense" to none; refuse them before anything changes."""
    policy = _policy(prefill, chosen.scorers, "prefill")
    decode_policy = _policy(decode, chosen.decoders, "decode")
    if policy is None and decode_policy is None:
        if DENSE in (prefill, decode):
            raise ValueError(
                "prefill and decoding would both be dense; use dense(model) for a while, or detach(model)"
            )
        raise ValueError(
            'these gates were saved without a policy; pass one, e.g. policy="top_k:0.1" for prefill or '
            'decode="token_budget:4096"'
        )
    chosen.policy, chosen.decode_policy = policy, decode_policy


def _serves(scorers: Gates | Scorer, phase: str) -> bool:
    """Whether scorers can choose in a phase: baselines in both, all gates in decoding (docs/method.md)."""
    return phase == "decode" or not isinstance(scorers, Gates) or phase in scorers.config.phases


def _policy(policy: Policy | str | None, scorers: Gates | Scorer, phase: str) -> Policy | None:
    """Return a policy for scorers in a phase, None if it is to be dense."""
    if policy is None or policy == DENSE:
        return None
    if isinstance(policy, str):
        policy = parse(policy, scorers.calibration if isinstance(scorers, Gates) else None)
    if not isinstance(policy, Policy):
        raise TypeError(f'policy must be a Policy or text such as "top_k:0.1", got {policy!r}')
    if not _serves(scorers, phase):
        raise ValueError(_DECODE_ALONE)
    if phase == "decode":
        if not isinstance(scorers, Gates) and not hasattr(scorers, "per_token"):
            raise ValueError(
                f"{type(scorers).__name__} has no per_token() and cannot choose for single tokens; decode by "
                "gates or a baseline, given as decode_gates"
            )
        block = scorers.config.block_size if isinstance(scorers, Gates) else scorers.per_token().block_size[1]
        check_decodes(policy, block)
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
    gates.shared(layers)
