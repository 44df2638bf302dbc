"""Scores of block pairs: the largest product over their pairs of sub-blocks, with a gradient."""

from __future__ import annotations

from torch import Tensor

from seerattention.ops.dispatch import choose, load_backends

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order; on a CPU only the reference, where Triton would be its interpreter.
ORDER = ("triton", "reference")


def score_blocks(
    queries: Tensor,
    keys: Tensor,
    sub_blocks: tuple[int, int],
    *,
    scale: float | None = None,
    past_blocks: int | None = 0,
    backend: str = "auto",
) -> Tensor:
    """Score block pairs: ``scale`` times the largest product over their pairs of summaries.

    The gradient of a score goes to the one pair that made it; among equals to the lowest sub-block of
    queries, then of keys. Nothing of the size of sub-block pairs is kept for the backward pass.

    Args:
        queries: Summaries of the query blocks, ``[B, H, Sq, E]``, in order;
            ``Nq = ceil(Sq / sub_blocks[0])``, a short last block has the summaries it has.
        keys: Summaries of the KV blocks, ``[B, Hk, Sk, E]``, ``Hk`` a divisor of ``H``: neighbouring heads
            of queries share a head of keys. Of the dtype of ``queries``.
        sub_blocks: Summaries per (query block, KV block).
        scale: Factor of the scores; default ``E ** -0.5``.
        past_blocks: KV blocks before the first query block: row ``r`` scores the blocks up to
            ``r + past_blocks``, later ones are 0 and pass no gradient. None scores every pair.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        fp32 ``[B, H, Nq, Nk]`` (fp64 for fp64 summaries), differentiable once.

    Raises:
        TypeError: If the dtypes differ or are not floating point.
        ValueError: If shapes do not fit, a number is out of range or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention, section 3.1 (arXiv 2410.13276); sub-blocks are this project's (docs/method.md).
    """
    _check(queries, keys, sub_blocks, past_blocks)
    order = ORDER if queries.device.type != "cpu" else ("reference",)
    args = {"queries": queries, "keys": keys, "sub_blocks": sub_blocks}
    args |= {"scale": queries.shape[-1] ** -0.5 if scale is None else scale, "past_blocks": past_blocks}
    return choose(BACKENDS, order, backend, **args).run(**args)


def _check(queries: Tensor, keys: Tensor, sub_blocks: tuple[int, int], past_blocks: int | None) -> None:
    for name, x in (("queries", queries), ("keys", keys)):
        if x.dim() != 4 or not x.numel():
            raise ValueError(f"{name} must be [B, H, S >= 1, E], got {list(x.shape)}")
    if queries.dtype != keys.dtype or not queries.dtype.is_floating_point:
        raise TypeError(
            f"queries and keys must share one floating-point dtype, got {queries.dtype} and {keys.dtype}"
        )
    if queries.shape[0] != keys.shape[0] or queries.shape[3] != keys.shape[3]:
        raise ValueError(
            f"queries {list(queries.shape)} and keys {list(keys.shape)} must agree in batch and dimension"
        )
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(
            f"heads of queries must be a multiple of those of keys, got {queries.shape[1]} and "
            f"{keys.shape[1]}"
        )
    if min(sub_blocks) < 1:
        raise ValueError(f"sub_blocks must be at least one summary per block, got {sub_blocks}")
    if past_blocks is not None and past_blocks < 0:
        raise ValueError(f"past_blocks must be at least 0, or None for every pair, got {past_blocks}")
