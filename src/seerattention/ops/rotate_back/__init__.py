"""Undo a rotary embedding: what gates read of keys, and of queries, that a host has rotated."""

from __future__ import annotations

from torch import Tensor

from seerattention.ops.dispatch import choose, load_backends, outside_autocast

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order.
ORDER = ("triton", "reference")


@outside_autocast
def rotate_back(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate vectors back, in fp32 or better.

    Entry ``i`` was turned with entry ``i + D / 2``. A rotation that also stretched, as scaled RoPE may, is
    undone whole.

    Args:
        x: ``[B, H, T, D]``, any strides, ``D`` even.
        cos: ``[B or 1, T, R]`` of the angles by which the first ``R <= D / 2`` pairs were turned, in radians;
            the others were not.
        sin: Of the same angles.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        The vectors before the rotation, of the shape and the dtype of ``x``.

    Raises:
        ValueError: If shapes do not fit or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.
    """
    batch, _, tokens, dim = x.shape
    if dim % 2:
        raise ValueError(f"vectors that are rotated have pairs of entries, got {dim}")
    for name, angles in (("cos", cos), ("sin", sin)):
        fits = angles.dim() == 3 and angles.shape[0] in (1, batch) and angles.shape[1] == tokens
        if not fits or angles.shape[2] > dim // 2 or angles.shape != cos.shape:
            raise ValueError(
                f"{name} must be [{batch} or 1, {tokens}, at most {dim // 2}], got {list(angles.shape)}"
            )
    return choose(BACKENDS, ORDER, backend, x=x, cos=cos, sin=sin).run(x, cos, sin)
