from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seerattention.testing.budget import Budget


def square(x: Tensor) -> Tensor:
    return x * x


def test_reference_is_within_its_own_budget() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(100).to(dtype)
        Budget.of(square, x).check(square(x))


def test_budget_is_twice_the_error_and_one_rounding() -> None:
    x = torch.tensor([1.0, 1.5, 3.0], dtype=torch.bfloat16)
    error = float((square(x).double() - x.double() ** 2).abs().max())
    budget = Budget.of(square, x)
    assert budget.allowed == 2 * error + 2.0**-7 * 9
    exact = torch.tensor([1.0, 2.25, 9.0], dtype=torch.bfloat16)
    budget.check(exact)
    # One unit in the last place at 9 is 2 ** -4.
    budget.check(exact + torch.tensor([0.0, 0.0, 2.0**-4], dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match=r"error 0\.125 exceeds the budget of 0\.0703"):
        budget.check(exact + torch.tensor([0.0, 0.0, 2.0**-3], dtype=torch.bfloat16))


def test_a_less_exact_dtype_does_not_pass_for_a_better_one() -> None:
    x = torch.randn(1000)
    budget = Budget.of(square, x)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        budget.check(square(x.bfloat16()).float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_fail(value: float) -> None:
    x = torch.randn(10)
    broken = square(x)
    broken[3] = value
    with pytest.raises(AssertionError, match=r"1 of 10 values are NaN|error inf exceeds"):
        Budget.of(square, x).check(broken)


def test_nan_in_the_truth_is_an_error() -> None:
    with pytest.raises(ValueError, match="the reference returns NaN"):
        Budget.of(square, torch.tensor([1.0, torch.nan]))


def test_shape_and_dtype_must_fit() -> None:
    x = torch.randn(10)
    budget = Budget.of(square, x)
    with pytest.raises(AssertionError, match=r"shape \[1, 10\], not \[10\]"):
        budget.check(square(x)[None])
    with pytest.raises(AssertionError, match=r"dtype torch.float64, not torch.float32"):
        budget.check(square(x).double())
