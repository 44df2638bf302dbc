from __future__ import annotations

import pytest
import torch

from seerattention.ops.cases.rotate_back import CASES, Case
from seerattention.ops.rotate_back import rotate_back
from seerattention.ops.summarise_blocks import rotate


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_was_rotated_is_as_it_was(case: Case) -> None:
    x, (cos, sin) = case.x(torch.float64), case.angles(torch.float64)
    turned = case.turned or case.dim // 2
    still = torch.ones(*cos.shape[:2], case.dim // 2 - turned)
    cos_of_all = torch.cat((cos, still, cos, still), -1)
    sin_of_all = torch.cat((sin, 0 * still, sin, 0 * still), -1)
    rotated = rotate(x, cos_of_all, sin_of_all)
    torch.testing.assert_close(rotate_back(rotated, cos, sin), x, atol=1e-5, rtol=0)


def test_half_precision_is_rotated_in_fp32() -> None:
    case = CASES[3]
    x, angles = case.x(torch.bfloat16), case.angles(torch.bfloat16)
    exact = rotate_back(x.float(), *(angle.float() for angle in angles))
    assert torch.equal(rotate_back(x, *angles), exact.bfloat16())


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 8), (1, 8, 9), (8, 8)])
def test_angles_of_another_shape(shape: tuple[int, ...]) -> None:
    right, wrong = torch.ones(1, 8, 8), torch.ones(shape)
    for turns, name in (((wrong, right), "cos"), ((right, wrong), "sin")):
        with pytest.raises(ValueError, match=rf"{name} must be \[2 or 1, 8, at most 8\], got"):
            rotate_back(torch.randn(2, 1, 8, 16), *turns)
    with pytest.raises(ValueError, match=r"sin must be"):
        rotate_back(torch.randn(2, 1, 8, 16), right, right[..., :4])
    with pytest.raises(ValueError, match="have pairs of entries, got 15"):
        rotate_back(torch.randn(2, 1, 8, 15), right[..., :7], right[..., :7])
