"""The one tolerance of this project: no kernel may err twice as much as the reference in its own dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding_band(gold: Tensor, dtype: torch.dtype) -> float:
    """Return the largest error that rounding ``gold`` to ``dtype`` makes, at least half a unit in 1."""
    exact = gold.double()
    rounded = (exact - exact.to(dtype).double()).abs().max() if exact.numel() else torch.zeros(())
    return max(float(rounded), torch.finfo(dtype).eps / 2)


def assert_within_budget(result: Tensor, gold: Tensor, reference: Tensor) -> None:
    """Assert that ``err(result) <= 2 * err(reference) + rounding band``, errors as maxima against gold.

    Args:
        result: What the kernel under test computed.
        gold: The reference in fp64.
        reference: The reference in the dtype of the result.

    Raises:
        AssertionError: If the error is over the budget, anything is not finite, or shapes or dtypes differ.

    Source: DESIGN of this project; FlashAttention's tests compare in the same way.
    """
    assert result.shape == gold.shape == reference.shape, (result.shape, gold.shape, reference.shape)
    assert result.dtype == reference.dtype, f"{result.dtype} is not {reference.dtype}"
    assert bool(torch.isfinite(result).all()), "the result holds NaN or infinity"
    error = float((result.double() - gold).abs().max())
    allowed = 2 * float((reference.double() - gold).abs().max()) + rounding_band(gold, result.dtype)
    assert error <= allowed, f"error {error:.3g} is over the budget of {allowed:.3g}"
