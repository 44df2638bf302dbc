"""The Triton kernel interpreted; `tests/ops/test_triton.py` runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seerattention.ops.cases.rotate_back import CASES, Case
from seerattention.ops.rotate_back import rotate_back
from seerattention.testing.budget import Budget

pytest.importorskip("triton")


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate_back(x, cos, sin, backend="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    x, angles = case.x(dtype), case.angles()
    out = rotate_back(x, *angles, backend="triton")
    assert out.dtype == dtype
    Budget.of(reference, x, *angles).check(out)


def test_a_table_in_half_precision() -> None:
    x, angles = CASES[3].x(), CASES[3].angles(torch.bfloat16)
    exact = reference(x, *(angle.float() for angle in angles))
    torch.testing.assert_close(rotate_back(x, *angles, backend="triton"), exact)


def test_reasons_why_not() -> None:
    x, angles = CASES[0].x(), CASES[0].angles()
    with pytest.raises(NotImplementedError, match="no backward"):
        rotate_back(x.requires_grad_(), *angles, backend="triton")
    with pytest.raises(NotImplementedError, match="must be float16, bfloat16 or float32"):
        rotate_back(x.detach().double(), *angles, backend="triton")
