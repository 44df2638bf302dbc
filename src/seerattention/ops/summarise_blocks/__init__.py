"""Summaries of blocks of queries or keys: what a gate's scores are products of."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattention.ops.dispatch import choose, load_backends, outside_autocast
from seerattention.ops.options import SummaryOptions
from seerattention.ops.summarise_blocks.reference import pool_blocks as pool_blocks
from seerattention.ops.summarise_blocks.reference import project_blocks as project_blocks
from seerattention.ops.summarise_blocks.reference import rotate as rotate
from seerattention.rows import Rows, num_blocks

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order.
ORDER = ("triton", "native", "reference")


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
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        ``[B, Ho, N, E]``, of packed sequences behind one another.

    Raises:
        ValueError: If shapes do not fit or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3.1 (arXiv 2410.13276).
    """
    heads = x.shape[1] // merge
    if weight is not None and (weight.shape[0] % heads or weight.shape[1] != merge * len(pools) * x.shape[3]):
        raise ValueError(
            f"weight must be [a multiple of {heads}, {merge} * {len(pools)} * {x.shape[3]}, E], "
            f"got {list(weight.shape)}"
        )
    packed = rows if rows is not None and rows.is_packed else None
    if packed is not None and x.shape[0] != 1:
        raise ValueError(f"packed sequences lie in one batch entry, x has {x.shape[0]}")
    blocks = num_blocks(x.shape[2], size) if packed is None else packed.places(x.shape[2], size)[-1].stop
    turns = blocks, x.shape[3] if weight is None else weight.shape[2]
    for name, angles in zip(("cos", "sin"), rotary or (), strict=False):
        if angles.shape[0] not in (1, x.shape[0]) or angles.shape[1:] != turns:
            raise ValueError(
                f"{name} must be [{x.shape[0]} or 1, {turns[0]}, {turns[1]}], got {list(angles.shape)}"
            )
    options = SummaryOptions(
        size=size, pools=pools, dtype=x.dtype if dtype is None else dtype, weight=weight, merge=merge,
        norm=norm, eps=eps, rotary=rotary, rows=packed,
    )  # fmt: skip
    return choose(BACKENDS, ORDER, backend, x=x, options=options).run(x, options)
