"""Dense causal attention, for what is not sparse: windows, soft-caps, sinks, and torch's own kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seerattention.crossover import cudnn_from
from seerattention.ops import flash_attention_4
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.dispatch import outside_autocast
from seerattention.rows import Rows
from seerattention.selection import BlockSelection

#: Kernels of dense attention in the order in which `cudnn_first` takes them.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

#: What the kernels of sparse attention, which then read every block, take on a GPU; and tokens per block.
HALF, WHOLE_BLOCK = (torch.float16, torch.bfloat16), 64

#: Query tokens per slice where causal attention with more keys than queries needs an explicit mask.
MASKED_ROWS = 512

#: Bytes of scores that dense attention with a soft-cap or sinks holds at once.
EXPLICIT_BYTES = 2**28


@outside_autocast
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of the last ``Tq`` of ``Tk`` tokens, each seeing the ``window`` latest keys.

    Args:
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hk, Tk, D]``.
        v: ``[B, Hk, Tk, D]``.
        scale: Softmax scale.
        window: Keys that a query sees, its own included; default all.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; default as they are.
        sinks: ``[Hq]``, a logit per head that takes part in the softmax's denominator only.
        positions: Of a padded batch: the position in its sequence of every query, int64 ``[B, Tq]``, and
            of every key, ``[B, Tk]``; -1 where there is none.

    Returns:
        ``[B, Hq, Tq, D]``, zeros where there is no query.
    """
    past = k.shape[2] - q.shape[2]
    if window is not None and window >= k.shape[2]:
        window = None
    plain = softcap is None and sinks is None
    if plain and window is None and positions is None and (past == 0 or q.shape[2] == 1):
        causal = q.shape[2] > 1
        if flash_attention_4.pays(q, k) and not flash_attention_4.unsupported(q, k, v):
            return flash_attention_4.attend(q, k, v, scale=scale)
        if q.is_cuda and causal and (least := cudnn_from()) is not None and q.shape[2] >= least:
            return cudnn_first(q, k, v, scale=scale)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
    if q.is_cuda and q.dtype in HALF and window is None and positions is None and past:
        # Torch's kernels need a mask for queries that are the last of more keys, and with one copies of the
        # keys for every query head, or the whole map.
        rows = Rows.last(q.shape[2], k.shape[2])
        everything = BlockSelection.full(rows, (WHOLE_BLOCK, WHOLE_BLOCK), q.device)
        return block_sparse_attention(
            q, k, v, everything, rows=rows, scale=scale, softcap=softcap, sinks=sinks
        )
    outs = []
    step = MASKED_ROWS if plain else _explicit_rows(q, k)
    for start in range(0, q.shape[2], step):
        part = q[:, :, start : start + step]
        first = past + start
        end = first + part.shape[2]
        if positions is None:
            begin = 0 if window is None else max(0, first - window + 1)
            rows = torch.arange(first, end, device=q.device)[None]
            columns = torch.arange(begin, end, device=q.device)[None]
        else:
            begin, end = 0, k.shape[2]
            rows, columns = positions[0][:, start : start + step], positions[1]
        mask = _mask(rows, columns, window)
        keys, values = k[:, :, begin:end], v[:, :, begin:end]
        if plain:
            out = _masked(part, keys, values, mask, scale)
        else:
            out = _explicit(part, keys, values, mask, scale, softcap, sinks)
        outs.append(out if positions is None else out.masked_fill(rows[:, None, :, None] < 0, 0))
    return torch.cat(outs, 2)


def _mask(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Return which keys queries see, bool ``[B, 1, Tq, Tk]``, from the positions ``[B, Tq]``, ``[B, Tk]``."""
    rows, columns = rows[:, None, :, None], columns[:, None, None]
    seen = (columns <= rows) & (columns >= 0)
    if window is not None:
        seen &= columns > rows - window
    # A row of nothing would be a row of NaN.
    return seen | (rows < 0)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention under a mask by torch's kernels."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1:
        # The heads of a group as its rows: with a mask torch would copy the keys for every head.
        out = F.scaled_dot_product_attention(
            q.unflatten(1, (-1, groups)).flatten(2, 3), k, v, attn_mask=mask, scale=scale
        )
        return out.unflatten(2, (groups, 1)).flatten(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups > 1)


def _explicit_rows(q: Tensor, k: Tensor) -> int:
    """Return how many query tokens' scores `_explicit` may hold at once."""
    row_bytes = 4 * q.shape[0] * q.shape[1] * k.shape[2]
    return max(1, min(MASKED_ROWS, EXPLICIT_BYTES // row_bytes))


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention by its scores, for what torch's kernels lack: soft-capped scores and sinks."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.unflatten(1, (k.shape[1], -1)) @ k.mT.unsqueeze(2)).to(exact) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.flatten(1, 2).masked_fill(~mask, float("-inf"))
    if sinks is None:
        shares = scores.softmax(-1)
    else:
        column = sinks.to(exact)[:, None, None].expand(*scores.shape[:-1], 1)
        shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    shares = shares.to(v.dtype).unflatten(1, (k.shape[1], -1))
    return (shares @ v.unsqueeze(2)).flatten(1, 2)


def cudnn_first(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Causal attention of whole sequences by cuDNN where it can, else in torch's usual order.

    torch prefers FA2 even on GPUs where cuDNN is much faster (docs/kernels.md), since cuDNN plans every
    new length anew: worth it for long prompts, not for decoding steps.
    """
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
