"""How far a kernel may be from the truth: the one error budget of all numerical tests.

The truth is the reference in fp64. A kernel may be twice as far from it as the reference computed in
the kernel's own dtype, plus one rounding of the result: no tolerance is chosen by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The largest error that a result may have.

    Attributes:
        gold: The result in fp64.
        dtype: What the kernel returns.
        allowed: Largest absolute difference from ``gold``.
    """

    gold: Tensor
    dtype: torch.dtype
    allowed: float

    @classmethod
    def of(cls, reference: Callable[..., Tensor], *inputs: Tensor) -> Budget:
        """Run the reference in fp64 and in the inputs' dtype.

        Args:
            reference: A function of the inputs alone.
            inputs: Floating-point tensors as the kernel gets them.

        Returns:
            The budget: ``2 * err(reference in the inputs' dtype)`` plus the rounding band, one unit in
            the last place of the returned dtype at the largest magnitude of the truth.

        Raises:
            ValueError: If the reference returns NaN, which nothing could be compared with.
        """
        gold = reference(*(x.double() for x in inputs)).double()
        plain = reference(*inputs)
        if gold.isnan().any() or plain.isnan().any():
            raise ValueError("the reference returns NaN for these inputs")
        band = torch.finfo(plain.dtype).eps * float(gold.abs().max())
        return cls(gold, plain.dtype, 2 * float((plain.double() - gold).abs().max()) + band)

    def check(self, actual: Tensor) -> None:
        """Check a kernel's result.

        Args:
            actual: The result, in the dtype that the reference returns.

        Raises:
            AssertionError: If shape or dtype differ, a value is NaN, or an error exceeds the budget.
        """
        assert actual.shape == self.gold.shape, f"shape {list(actual.shape)}, not {list(self.gold.shape)}"
        assert actual.dtype == self.dtype, f"dtype {actual.dtype}, not {self.dtype}"
        assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} values are NaN"
        error = float((actual.double() - self.gold).abs().max())
        assert error <= self.allowed, f"error {error:.3g} exceeds the budget of {self.allowed:.3g}"
