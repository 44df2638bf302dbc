"""The compiled kernel of `rotate_back`; tests/ops runs the same code in the interpreter."""

import pytest
import torch

from seerattention.ops.cases.rotate_back import CASES, Case
from seerattention.ops.rotate_back import rotate_back
from seerattention.testing.budget import Budget
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

LONG = Case(name="long", tokens=9001, heads=32, dim=128)


def reference(x, cos, sin):
    return rotate_back(x, cos, sin, backend="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*CASES, LONG], ids=lambda case: case.name)
def test_within_the_error_budget(case, dtype):
    x, angles = case.x(dtype, "cuda"), case.angles(device="cuda")
    Budget.of(reference, x, *angles).check(rotate_back(x, *angles, backend="triton"))


def test_nothing_waits_and_only_the_result_is_allocated():
    x, angles = LONG.x(torch.bfloat16, "cuda"), LONG.angles(torch.bfloat16, "cuda")
    rotate_back(x, *angles, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        out = rotate_back(x, *angles)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 2**20


def test_heads_further_apart_than_32_bits_count():
    tokens = 2**24 + 100
    x = torch.randn(1, 2, 1, 128, device="cuda", dtype=torch.bfloat16).expand(1, 2, tokens, 128).contiguous()
    cos = torch.zeros(1, 1, 64, device="cuda").expand(1, tokens, 64)
    out = rotate_back(x, cos, torch.ones_like(cos[:, :1]).expand(1, tokens, 64), backend="triton")
    first, second = x.chunk(2, -1)
    assert torch.equal(out[..., :64], second)
    assert torch.equal(out[..., 64:], -first)


def test_compilers_take_the_reference():
    x, angles = CASES[3].x(torch.bfloat16, "cuda"), CASES[3].angles(device="cuda")
    compiled = torch.compile(rotate_back, fullgraph=True)(x, *angles)
    Budget.of(reference, x, *angles).check(compiled)
