"""Soft gates: attention whose logits feel how sure the gate was, so that the language loss teaches it too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.block_sparse_attention.reference import token_mask
from seerattention.policies import Policy
from seerattention.rows import Rows
from seerattention.selection import BlockSelection


def log_gates(
    scores: Tensor, selection: BlockSelection, policy: Policy, num_tokens: int, temperature: float
) -> Tensor:
    """Return the logarithm of every block's gate: near 0 for clear choices, negative for close calls.

    A gate is ``sigmoid((score - limit) / temperature)``, its limit half-way between the worst block that
    the policy took in the row and the best it left; no gradient passes the limit. Blocks that are read
    whatever their score, and rows that leave none out, have an open gate, 0. Towards a temperature of 0
    gates become hard.

    The scores, from before softmax and with a gradient, and what is returned are fp32 ``[B, H, N, N]``; of
    blocks that are not read it is without a meaning.
    """
    size = selection.block_size
    rows = Rows.last(num_tokens, num_tokens)
    valid = rows.causal(size, scores.device)
    always = policy.always(rows.own(size, scores.device), valid)
    chosen = selection.to_mask() & ~always
    fixed, infinity = scores.detach(), float("inf")
    worst = fixed.masked_fill(~chosen, infinity).amin(-1, keepdim=True)
    best = fixed.masked_fill(chosen | always | ~valid, -infinity).amax(-1, keepdim=True)
    limited = torch.isfinite(worst) & torch.isfinite(best)
    limit = torch.where(limited, (worst + best) / 2, 0.0)
    gates = F.logsigmoid((scores - limit) / temperature)
    return torch.where(limited & chosen, gates, 0.0)


def soft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    bias: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute `block_sparse_attention` with a bias per block, by its whole map.

    The bias is fp32, shaped as the selection, and added to a block's logits after scale and soft-cap. The
    result is differentiable in q, k, v and bias.
    """
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    mask = token_mask(selection, q.shape[1], Rows.last(length, length))
    scores = (q * scale) @ k.repeat_interleave(groups, 1).mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    block_q, block_k = selection.block_size
    bias = bias.to(scores.dtype).repeat_interleave(q.shape[1] // bias.shape[1], 1)
    bias = bias.repeat_interleave(block_q, 2)[:, :, :length].repeat_interleave(block_k, 3)[..., :length]
    scores = (scores + bias).masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    share = torch.softmax(scores, dim=-1)[..., :length]
    return share @ v.repeat_interleave(groups, 1)
