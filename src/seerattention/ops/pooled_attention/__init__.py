"""Dense attention together with its block-max-pooled map: what the gates are taught to predict."""

from __future__ import annotations

from torch import Tensor

from seerattention.ops._dispatch import check_qkv, choose, load_backends

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order.
ORDER = ("chunked",)


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute causal attention and, for every block pair, the largest attention weight inside it.

    Args:
        q: ``[B, Hq, Tq, D]``, the last ``Tq`` of ``Tk`` tokens.
        k: ``[B, Hk, Tk, D]``.
        v: ``[B, Hk, Tk, D]``.
        block_size: Tokens per (query block, KV block).
        scale: Softmax scale; default ``D ** -0.5``.
        backend: ``auto``, or a name of ``BACKENDS``.

    Returns:
        The exact output ``[B, Hq, Tq, D]``, and the target: fp32 ``[B, Hq, Nq, Nk]``, the 2-D
        max-pool of the causal softmax map, each row divided by its sum. No gradient reaches q, k or v.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If shapes or devices do not fit, or the backend is unknown.

    Source: SeerAttention, section 3.2, equation 2 (arXiv 2410.13276).
    """
    check_qkv(q, k, v)
    return _run(q, k, v, block_size, scale, backend)  # type: ignore[return-value]


def pooled_map(
    q: Tensor,
    k: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return only the target of `pooled_attention`, fp32 ``[B, Hq, Nq, Nk]``."""
    check_qkv(q, k)
    return _run(q, k, None, block_size, scale, backend)[1]


def _run(
    q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], scale: float | None, backend: str
) -> tuple[Tensor | None, Tensor]:
    if min(block_size) < 1:
        raise ValueError(f"block sizes must be at least one token, got {block_size}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    module = choose(BACKENDS, ORDER, backend, q=q, k=k, v=v, block_size=block_size)
    return module.run(q.detach(), k.detach(), None if v is None else v.detach(), block_size, scale=scale)
