"""The report's maps: the true one, the gate's, what each policy reads of it and what it misses."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seerattention.gate import AttnGate
from seerattention.hosts.transformers import AttentionCall, Gates
from seerattention.measure.maps import check_finite, record_layers, true_map
from seerattention.ops.attention_scores import block_mass
from seerattention.policies import Calibrated, Policy, TopK, select
from seerattention.rows import Rows, num_blocks

#: The least share that a map tells from nothing.
FLOOR = 1e-4

#: Bytes that the maps may take in the page.
MAP_BYTES = 4_500_000

#: What a policy does with a block, two bits each; "best" are the blocks of the row with the largest true
#: weights, as many as the policy reads, those included that it reads whatever the scores.
NOT_READ, READ_BEST, READ_OTHER, MISSED = range(4)


def fitting_layers(gates: Gates, tokens: int, policies: int) -> list[int]:
    """Return the layers whose maps fit into a page, spread evenly; all of them where all fit.

    Args:
        gates: The gates.
        tokens: Of the text.
        policies: How many are shown.

    Raises:
        ValueError: If not even one layer fits.
    """
    layers = [index for index, _ in gates.items()]
    blocks = num_blocks(tokens, gates.config.block_size)
    pairs = blocks * (blocks + 1) // 2
    head = (2 + policies / 4) * pairs * 4 / 3 + 5 * policies * blocks
    count = min(len(layers), int(MAP_BYTES // (head * gates.config.num_heads)))
    if not count:
        raise ValueError(
            f"the maps of one layer at {tokens:,} tokens are too large for a page; give fewer tokens"
        )
    return [layers[i] for i in np.linspace(0, len(layers) - 1, count).round().astype(int)]


def explore(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gates: Gates,
    tokens: np.ndarray,
    policies: list[Policy],
    *,
    layers: list[int] | None = None,
    step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run a text densely and return what the page's explorer shows.

    Args:
        model: The base model, nothing attached.
        tokenizer: Its tokenizer.
        gates: Its gates, on its device.
        tokens: int ``[T]``.
        policies: What to select by.
        layers: Whose maps are kept; default as many as fit into a page.
        step: Called after every layer.

    Returns:
        Plain JSON types: the text of every block, and for every layer and head the true map and the gate's
        as base64 of one byte per causal pair of blocks in row order (see `_bytes`), and per policy two bits
        for each (see `block_states`), density, recall (the share of the attention in the blocks read) and
        the recall of every row in thousandths.

    Raises:
        ValueError: If the gates are for another model, a layer has no gate, the text is shorter than two
            blocks, or the maps do not fit into a page.
    """
    block, all_layers = gates.config.block_size, [index for index, _ in gates.items()]
    fitting = fitting_layers(gates, len(tokens), len(policies))
    if len(tokens) < 2 * block:
        raise ValueError(f"the text must have at least two blocks, {2 * block} tokens, got {len(tokens)}")
    if unknown := sorted(set(layers or ()) - set(all_layers)):
        raise ValueError(f"there are no gates in layers {unknown}; these gates are for layers {all_layers}")
    if layers and len(set(layers)) > len(fitting):
        raise ValueError(
            f"the maps of {len(set(layers))} layers at {len(tokens):,} tokens are too large for a page, "
            f"{len(fitting)} fit; give fewer layers or fewer tokens"
        )
    kept = sorted(set(layers)) if layers else fitting

    def look(call: AttentionCall, gate: AttnGate, scores: Tensor) -> list[dict[str, Any]]:
        return _heads(call, gate, scores, policies) if call.layer in kept else []

    found = record_layers(model, gates, [tokens], look, step)
    return {
        "model": gates.base.name,
        "tokens": len(tokens),
        "block": block,
        "floor": FLOOR,
        "layers": kept,
        "all_layers": all_layers,
        "policies": [{"name": str(policy), "label": _label(policy, gates)} for policy in policies],
        "blocks": [
            str(tokenizer.decode(part.tolist()))
            for part in np.split(tokens, range(block, len(tokens), block))
        ],
        "heads": [found[layer][0] for layer in kept],
    }


def _label(policy: Policy, gates: Gates) -> str:
    """Say in words what a policy reads."""
    saved = ", saved with the gates" if str(policy) == gates.policy else ""
    if isinstance(policy, Calibrated):
        c = policy.calibration
        what = {"density": "density", "recall": "recall", "ppl_increase": "perplexity rise"}[c.target]
        return f"calibrated: {what} {c.value:.1%}, on {c.tokens:,} tokens{saved}"
    if isinstance(policy, TopK):
        return f"top-k, {policy.density:.0%} of the blocks{saved}"
    return f"{policy}{saved}"


def _heads(
    call: AttentionCall, gate: AttnGate, scores: Tensor, policies: list[Policy]
) -> list[dict[str, Any]]:
    """Return the maps and selections of one layer's heads."""
    length, block = call.q.shape[2], gate.block_size
    true, share = true_map(call, block)[0], scores.softmax(-1)[0]
    rows = Rows.last(length, length)
    valid = rows.causal(block, scores.device)
    mass = block_mass(call.q, call.k, block, scale=call.scale, softcap=call.softcap)[0]
    check_finite(call.layer, mass)
    group = true.shape[0] // share.shape[0]
    chosen = []
    for policy in policies:
        policy = policy.at(call.layer)
        selection = select(policy, scores, rows=rows, block_size=block)
        read = selection.to_mask()[0].repeat_interleave(group, 0)
        always = policy.always(rows.own(block, valid.device), valid)
        chosen.append((read, block_states(read, true, always, valid)))
    pairs = valid.cpu().numpy()
    causal = int(valid.sum())
    heads = []
    for h in range(true.shape[0]):
        read = [
            {
                "states": _states(states[h].cpu().numpy()[pairs]),
                "density": round(int(mask[h].sum()) / causal, 5),
                "recall": round(float((mass[h] * mask[h]).sum() / mass[h].sum()), 5),
                "rows": [round(1000 * float(x)) for x in (mass[h] * mask[h]).sum(-1) / mass[h].sum(-1)],
            }
            for mask, states in chosen
        ]
        maps = {"true": _bytes(true[h], pairs), "gate": _bytes(share[h // group], pairs)}
        heads.append({**maps, "policies": read})
    return heads


def block_states(read: Tensor, true: Tensor, always: Tensor, valid: Tensor) -> Tensor:
    """Compare what is read with the best that as many blocks could be.

    Args:
        read: bool ``[Hq, N, N]``.
        true: fp32 ``[Hq, N, N]``, the true map.
        always: bool ``[N, N]``, read whatever the scores.
        valid: bool ``[N, N]``, causal pairs.

    Returns:
        uint8 ``[Hq, N, N]``: `NOT_READ`, `READ_BEST`, `READ_OTHER` or `MISSED`.
    """
    ranked = true.masked_fill(always, math.inf).masked_fill(~valid, -math.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(read.shape[-1], device=read.device) < read.sum(-1, keepdim=True)
    best = torch.zeros_like(read).scatter_(-1, order, first)
    states = torch.full(read.shape, NOT_READ, dtype=torch.uint8, device=read.device)
    states[read & best], states[read & ~best], states[best & ~read] = READ_BEST, READ_OTHER, MISSED
    return states


def _bytes(share: Tensor, pairs: np.ndarray) -> str:
    """Return shares as base64: 0 below `FLOOR`, else 1 to 255 in equal steps of the logarithm, up to 1."""
    logarithm = np.log10(np.maximum(share.float().cpu().numpy()[pairs], FLOOR)) / -math.log10(FLOOR)
    steps = np.where(logarithm > -1, np.clip(np.rint(255 + 254 * logarithm), 1, 255), 0)
    return base64.b64encode(steps.astype(np.uint8).tobytes()).decode()


def _states(states: np.ndarray) -> str:
    """Return two bits per block as base64, the first block in the lowest bits."""
    padded = np.pad(states, (0, -len(states) % 4)).reshape(-1, 4)
    return base64.b64encode(
        (padded << np.array([0, 2, 4, 6], np.uint8)).sum(1).astype(np.uint8).tobytes()
    ).decode()
