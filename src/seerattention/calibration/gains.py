"""What reading each block gains each head, in sampled rows of true attention maps.

A window of text is run densely. Of sampled rows of query blocks this keeps what the gate says of every
block, the attention mass in it, and its *gain*: how much nearer it brings a sparse output to the dense one,
read after those that its gate puts before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.gate import AttnGate
from seerattention.hosts.transformers import AttentionCall, Gates
from seerattention.measure.maps import check_finite, record_layers
from seerattention.ops.attention_scores import WORK_BYTES, attention_scores, by_block
from seerattention.policies import Policy
from seerattention.rows import Rows, num_blocks

#: Rows of query blocks per window whose maps are kept.
ROWS = 64


@dataclass(frozen=True)
class Maps:
    """What was seen in sampled rows, for all heads of all layers in turn, ``A``; ``S`` rows of all windows.

    Attributes:
        layers: Layer indices.
        block_size: Tokens per (query block, KV block).
        rows: int64 ``[S]``, the query block of each row in its window.
        log_share: fp32 ``[A, S, N]``, logarithm of the gate's softmax; -inf where acausal.
        mass: fp32 ``[A, S, N]``, share of the attention of the row's queries; rows sum to 1.
        gain: fp32 ``[A, S, N]``, by how much reading a block lowers the squared difference of the sparse
            output from the dense one, its queries' mean, relative to the mean squared output of the layer.
            Read before it are those that ``knobs`` always reads, whose gain is 0, and those whose share is
            larger.
        knobs: A policy whose sink and local blocks and dense last rows are read besides.
    """

    layers: list[int]
    block_size: tuple[int, int]
    rows: Tensor
    log_share: Tensor
    mass: Tensor
    gain: Tensor
    knobs: Policy


@torch.inference_mode()
def record(
    model: PreTrainedModel,
    gates: Gates,
    windows: list[np.ndarray],
    knobs: Policy,
    step: Callable[[], None] | None = None,
) -> Maps:
    """Run windows of text densely and return the maps of sampled rows.

    Args:
        model: The base model, nothing attached.
        gates: Its gates.
        windows: int ``[T]`` each, all of one length.
        knobs: A policy with the sink and local blocks and dense last rows to use.
        step: Called after every layer of every window.

    Raises:
        FloatingPointError: If the gates' scores or the attention are not finite.
    """
    block = gates.config.block_size
    geometry = Rows.last(*2 * (num_blocks(len(windows[0]), block) * block,))
    valid, own = (mask((block, block)) for mask in (geometry.causal, geometry.own))
    rows = torch.linspace(0, len(valid) - 1, min(ROWS, len(valid))).round().long()
    # Of shorter texts other rows are the last, so that none is dense here.
    always = replace(knobs, dense_last_rows=0).always(own, valid)[rows]

    def look(call: AttentionCall, gate: AttnGate, scores: Tensor) -> tuple[Tensor, ...]:
        share = scores[0, :, rows.to(scores.device)].log_softmax(-1)
        mass, gain = _true_rows(call, rows, block, share, always.to(share.device))
        check_finite(call.layer, gain)
        return share.cpu(), mass.cpu(), gain.cpu()

    seen = record_layers(model, gates, windows, look, step)
    share, mass, gain = (
        torch.cat([torch.cat([w[i] for w in of_layer], 1) for of_layer in seen.values()]) for i in range(3)
    )
    return Maps(list(seen), (block, block), rows.repeat(len(windows)), share, mass, gain, knobs)


def _true_rows(
    call: AttentionCall, rows: Tensor, block: int, share: Tensor, always: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mass and gain of the blocks of some rows, fp32 ``[H, S, N]``, as they are read by ``share``."""
    heads, (kv_heads, tokens), device = share.shape[0], call.k.shape[1:3], call.q.device
    groups = call.q.shape[1] // kv_heads
    mass = torch.zeros(call.q.shape[1], *share.shape[1:], device=device)
    gain, output = torch.zeros_like(mass), torch.zeros((), device=device)
    # Stable: a row's acausal blocks come last, first of them those that a later row beside it sees.
    orders = share.masked_fill(always, math.inf).argsort(dim=-1, descending=True, stable=True)
    orders = orders.repeat_interleave(call.q.shape[1] // heads, 0)
    ends, rows = (rows + 1).tolist(), rows.to(device)
    place = torch.arange(share.shape[2], device=device)
    taken = (place >= always.sum(-1, keepdim=True)) & (place <= rows[:, None])
    position = rows[:, None] * block + torch.arange(block, device=device)
    # A short last block has queries of its own alone; what fills it counts nothing in a mean.
    real = position < tokens
    mean, position = real / real.sum(-1, keepdim=True), position.clamp_max(tokens - 1)
    budget = WORK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    step = max(1, budget // (4 * groups * block * (tokens + share.shape[2] * call.v.shape[3])))
    for h in range(kv_heads):
        group = slice(h * groups, (h + 1) * groups)
        for first in range(0, len(ends), step):
            part = slice(first, first + step)
            blocks, at = ends[part][-1], position[part].flatten()
            q, k = call.q[0, group][:, at], call.k[0, h : h + 1, : blocks * block]
            scores = attention_scores(q, k, at, scale=call.scale, softcap=call.softcap)
            scores = scores.unflatten(1, (-1, block))
            weights = by_block(scores.softmax(-1), block)
            values = by_block(call.v[0, h, : blocks * block].float(), block, 0)
            in_block = weights.sum(-1)
            mass[group, part, :blocks] = (in_block * mean[part, :, None]).sum(2)
            order = orders[group, part, :blocks]
            places = order[:, :, None].expand_as(in_block)
            parts = torch.einsum("grqjt,jtd->grqjd", weights, values)
            parts = parts.gather(3, places[..., None].expand_as(parts)).cumsum(3)
            read = in_block.gather(3, places).cumsum(3)[..., None]
            if call.sinks is not None:
                # A sink takes part of the weights that all keys share.
                sinks = call.sinks[group, None, None].float()
                keys = torch.sigmoid(scores.logsumexp(-1) - sinks)[..., None, None]
                parts, read = parts * keys, read * keys + 1 - keys
            # The output with the first, the first two, ... and all blocks in this order.
            outs = parts / read.clamp_min(torch.finfo(read.dtype).tiny)
            error = ((outs - outs[..., -1:, :]).pow(2).sum(-1) * mean[part, :, None]).sum(2)
            less = -error.diff(dim=-1, prepend=error[..., :1])
            gain[group, part].scatter_(2, order, less.masked_fill(~taken[part, :blocks], 0))
            output += (outs[..., -1, :].pow(2).sum(-1) * mean[part]).sum() / len(ends)
    gain /= output.clamp_min(torch.finfo(gain.dtype).tiny)
    # Gates with one score per KV head choose for all heads of a group.
    return mass.unflatten(0, (heads, -1)).mean(1), gain.unflatten(0, (heads, -1)).sum(1)
