"""Policies turn block scores into a `BlockSelection`.

``Threshold``, ``TopK``, ``TopP``, ``TokenBudget``; and ``Calibrated``, which gates bring along.

A policy is a run-time choice: one set of trained gates serves all of them. `select` is the one place
that guarantees what every kernel relies on: no acausal block, and the query's own block always read.
To add a policy, write one file with a frozen dataclass and import it here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.policies.base import Policy as Policy
from seerattention.policies.base import Rule as Rule
from seerattention.policies.base import rule_of as rule_of
from seerattention.policies.calibrated import Calibrated as Calibrated
from seerattention.policies.calibrated import Calibration as Calibration
from seerattention.policies.threshold import Threshold as Threshold
from seerattention.policies.token_budget import TokenBudget as TokenBudget
from seerattention.policies.top_k import TopK as TopK
from seerattention.policies.top_p import TopP as TopP
from seerattention.rows import Rows
from seerattention.selection import BlockSelection


def policies() -> dict[str, type[Policy]]:
    """Return every policy imported here by its text name."""
    exported = (p for p in globals().values() if isinstance(p, type) and issubclass(p, Policy))
    return {p.name: p for p in exported if p is not Policy}


def forms() -> list[str]:
    """Return how every policy is written, by name."""
    return [policy.form() for _, policy in sorted(policies().items())]


def parse(text: str, calibration: Calibration | None = None) -> Policy:
    """Read a policy from its text form, the inverse of ``str(policy)``.

    Args:
        text: ``name:value`` and any common knobs, e.g. ``"threshold:5e-4,dense_last_rows=2"``; or
            ``calibrated`` and knobs.
        calibration: What ``calibrated`` means, saved with the gates.

    Returns:
        The policy.

    Raises:
        ValueError: If the name, a knob or a value is not understood; the message lists the valid ones. Or
            if ``calibrated`` is asked for without a calibration.
    """
    head, *knobs = text.strip().split(",")
    name, colon, value = head.partition(":")
    known = policies()
    if name not in known or bool(colon) != (known[name] is not Calibrated):
        raise ValueError(f"unknown policy {text!r}; write one of {', '.join(forms())}")
    kind = known[name]
    if kind is not Calibrated:
        arguments: dict[str, Any] = {kind.value_name(): _number(text, kind.value_name(), value)}
    elif calibration is not None:
        arguments = {"calibration": calibration}
    else:
        raise ValueError(
            "the policy calibrated needs gates that were calibrated, and these were not; run "
            "'seerattention calibrate GATES --text TEXT --density 0.1', or choose another policy"
        )
    for knob in knobs:
        key, equals, number = knob.strip().partition("=")
        if key not in kind.KNOBS or not equals:
            raise ValueError(
                f"unknown knob {knob!r} in policy {text!r}; the knobs are "
                f"{', '.join(f'{k}=<blocks>' for k in kind.KNOBS)}"
            )
        arguments[key] = _number(text, key, number)
    return kind(**arguments)


def _number(text: str, key: str, value: str) -> float | int:
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{key} in policy {text!r} must be a number, got {value!r}") from None


def check_decodes(policy: Policy, block_tokens: int) -> None:
    """Refuse a policy that makes no sense for single tokens.

    Args:
        policy: The policy.
        block_tokens: Key tokens per KV block.

    Raises:
        ValueError: If it follows a prompt's length, has dense last rows, or reads less than a block.
    """
    remedy = 'decode by "token_budget:4096", "threshold:5e-3" or "top_p:0.95"'
    if not policy.decodes:
        raise ValueError(f"{policy} is a share of a whole prompt, and a step of decoding has none; {remedy}")
    if policy.dense_last_rows:
        raise ValueError(f"{policy}: dense_last_rows are a prompt's; leave it out for decoding")
    if isinstance(policy, TokenBudget) and policy.tokens < block_tokens:
        raise ValueError(
            f"{policy} is less than a block of {block_tokens} tokens, and a token's own block is always read"
        )


def select(policy: Policy, scores: Tensor, *, rows: Rows, block_size: tuple[int, int]) -> BlockSelection:
    """Choose blocks by a policy and add those that are always read.

    Args:
        policy: Which blocks to take; asked per packed sequence.
        scores: fp32 ``[B, H, Nq, Nk]``, before softmax; larger means more important.
        rows: Where the queries lie among the keys.
        block_size: Tokens per (query block, KV block).

    Returns:
        The selection. Every row holds the query's own block, sink and local blocks, which count towards a
        number of blocks and come on top of other choices; dense last rows hold everything.

    Raises:
        ValueError: If the scores do not fit the rows.
    """
    valid, own = rows.causal(block_size, scores.device), rows.own(block_size, scores.device)
    if scores.dim() != 4 or scores.shape[2:] != valid.shape:
        raise ValueError(
            f"scores must be [B, H, {valid.shape[0]}, {valid.shape[1]}] for {rows.num_queries} queries "
            f"and {rows.num_keys} keys in blocks of {block_size}, got {list(scores.shape)}"
        )
    masks = []
    for _, (down, across) in rows.maps(block_size):
        seen = valid[down, across]
        mask = policy.read(scores[:, :, down, across], own[down, across], seen, block_size[1])
        masks.append(F.pad(mask, (0, valid.shape[1] - seen.shape[1])))
    return BlockSelection.from_mask(torch.cat(masks, 2), block_size, check=False)
