"""What kernels of all ops compute in."""

from __future__ import annotations

import torch
from torch import Tensor

#: What the matrix units of GPUs multiply.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def products(x: Tensor) -> str:
    """How a Triton kernel multiplies matrices of fp32, its ``input_precision``.

    NVIDIA's matrix units come to fp32's accuracy by three products of halves of the digits; without
    them, and where compilers do not offer this, plain fp32 arithmetic does.
    """
    return "tf32x3" if x.is_cuda and torch.version.hip is None else "ieee"
