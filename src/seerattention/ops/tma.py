"""Tiles described to TMA, by which Hopper GPUs and later copy into shared memory."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from seerattention.ops.language import padded
from seerattention.ops.launch import Launch


def tiles(launch: Launch, rows: int, *tensors: Tensor) -> list[object] | None:
    """Describe tiles of ``rows`` tokens of ``[B, H, T, D]``; None where TMA cannot bring them or is off."""
    if not launch.tma or not tensors[0].is_cuda or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return None
    described: list[object] = []
    for x in tensors:
        # It wants addresses and strides of whole 16 bytes.
        steps = [x.data_ptr(), *(x.element_size() * s for s in x.stride()[:3])]
        if any(step % 16 for step in steps) or min(x.stride()[:3]) == 0:
            return None
        described.append(describe(x, list(x.shape), list(x.stride()), [1, 1, rows, padded(x.shape[3])]))
    return described


def can_copy(x: Tensor) -> bool:
    """Return whether TMA can copy tiles of ``[B, H, T, D]``: address and strides are of whole 16 bytes."""
    strides = [s * x.element_size() for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    return x.stride(3) == 1 and all(strides) and not any(s % 16 for s in strides) and aligned(x)


def aligned(x: Tensor) -> bool:
    """Return whether a tensor begins at a whole 16 bytes, which one without memory does not."""
    # A compiler cannot read addresses; there the descriptor asserts it.
    if torch.compiler.is_compiling():
        return True
    # PyTorch refuses to tell for some, as in `torch.func.vmap`, and tells nothing for others.
    try:
        at = x.data_ptr()
    except RuntimeError:
        return False
    return at % 16 == 0 and (at != 0 or not x.numel())


def line(numbers: int, x: Tensor) -> object:
    """Describe pieces of a contiguous tensor, as if it had one dimension.

    Args:
        numbers: Length of a piece, a power of two of at least 16 bytes.
        x: The tensor.
    """
    return describe(x, [x.numel()], [1], [numbers])


def describe(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> object:
    """Describe blocks of a tensor, which is seen with the shape and strides given."""
    # Only backends that found Triton come here.
    tools = importlib.import_module("triton.tools.tensor_descriptor")
    return tools.TensorDescriptor(x, shape, strides, block)
