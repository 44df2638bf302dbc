"""Summaries of blocks of queries or keys: what a gate's scores are products of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from seerattention.gate_config import POOLS
from seerattention.ops.dispatch import choose, load_backends, outside_autocast
from seerattention.ops.options import SummaryOptions
from seerattention.ops.summarise_blocks.reference import pool_blocks as pool_blocks
from seerattention.ops.summarise_blocks.reference import project_blocks as project_blocks
from seerattention.ops.summarise_blocks.reference import rotate as rotate
from seerattention.rows import Rows, num_blocks

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order.
ORDER = ("hopper", "triton", "native", "reference")


@outside_autocast
def summarise_blocks(
    x: Tensor,
    size: int,
    pools: tuple[str, ...],
    *,
    dtype: torch.dtype | None = None,
    weight: Tensor | None = None,
    merge: int = 1,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
    rows: Rows | None = None,
    rounded_to: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pool blocks of tokens, project them per head, normalise and rotate.

    Args:
        x: ``[B, H, T, D]``, any strides; of packed sequences the queries or the keys, ``[1, H, T, D]``.
        size: Tokens per block; a short last block is pooled over the tokens it has.
        pools: Any of max, min, avg, concatenated in this order.
        dtype: To compute in and to return; default the dtype of x.
        weight: ``[Ho, merge * len(pools) * D, E]``. ``Ho`` is a multiple of the heads there are: then
            each is projected several times. Default no projection.
        merge: Heads of x whose pools are concatenated before the projection.
        norm: ``[E]``, weight of an RMS norm; default none.
        eps: Of the norm.
        rotary: cos and sin ``[B or 1, N, E]`` of the angles to rotate by; default no rotation.
        rows: Where packed sequences lie in x: blocks begin anew with each. Default none are packed.
        rounded_to: Dtype of few bits to round the result to, see `narrowed`; default not at all.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        ``[B, Ho, N, E]``, of packed sequences behind one another.

    Raises:
        ValueError: If shapes do not fit or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3.1 (arXiv 2410.13276).
    """
    packed = rows if rows is not None and rows.is_packed else None
    options = SummaryOptions(
        size=size, pools=pools, dtype=x.dtype if dtype is None else dtype, weight=weight, merge=merge,
        norm=norm, eps=eps, rotary=rotary, rows=packed, rounded_to=rounded_to,
    )  # fmt: skip
    _check(x, options)
    if rotary is not None and rotary[0].shape != rotary[1].shape:
        # Backends go by the batch of one of them.
        options = replace(options, rotary=torch.broadcast_tensors(*rotary))
    return choose(BACKENDS, ORDER, backend, x=x, options=options).run(x, options)


def _check(x: Tensor, options: SummaryOptions) -> None:
    pools, merge, weight, rows = options.pools, options.merge, options.weight, options.rows
    if x.dim() != 4:
        raise ValueError(f"x must be [B, H, T, D], got {list(x.shape)}")
    if options.size < 1:
        raise ValueError(f"blocks must be of at least one token, got {options.size}")
    if not pools or any(pool not in POOLS or pools.count(pool) > 1 for pool in pools):
        raise ValueError(f"pools must be some of {', '.join(POOLS)}, each once, got {pools!r}")
    if merge < 1 or x.shape[1] % merge or not x.shape[1]:
        raise ValueError(f"heads must be a multiple of merge={merge}, one at least, got {x.shape[1]}")
    heads, width = x.shape[1] // merge, merge * len(pools) * x.shape[3]
    if weight is not None:
        if weight.dim() != 3 or weight.shape[0] % heads or weight.shape[1] != width:
            raise ValueError(
                f"weight must be [a multiple of {heads}, {merge} * {len(pools)} * {x.shape[3]}, E], "
                f"got {list(weight.shape)}"
            )
        width = weight.shape[2]
    if options.norm is not None and options.norm.shape != (width,):
        raise ValueError(f"norm must be [{width}], got {list(options.norm.shape)}")
    if rows is not None and x.shape[0] != 1:
        raise ValueError(f"packed sequences lie in one batch entry, x has {x.shape[0]}")
    tokens, size = x.shape[2], options.size
    blocks = num_blocks(tokens, size) if rows is None else rows.places(tokens, size)[-1].stop
    if options.rotary is not None and width % 2:
        raise ValueError(f"pairs of numbers are rotated, and summaries have {width}")
    for name, angles in zip(("cos", "sin"), options.rotary or (), strict=False):
        if angles.shape[0] not in (1, x.shape[0]) or angles.shape[1:] != (blocks, width):
            raise ValueError(
                f"{name} must be [{x.shape[0]} or 1, {blocks}, {width}], got {list(angles.shape)}"
            )
