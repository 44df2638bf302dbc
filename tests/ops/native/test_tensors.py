"""Tensors that the CPU's kernels, which read memory and have no gradient, cannot take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.score_blocks import score_blocks
from seerattention.ops.summarise_blocks import summarise_blocks
from seerattention.rows import Rows

FULL = BlockSelection.full(Rows.last(40, 40), (16, 16))


def attention(x: Tensor, backend: str) -> Tensor:
    return block_sparse_attention(x, x, x, FULL, backend=backend)


def scores(x: Tensor, backend: str) -> Tensor:
    return score_blocks(x, x, (4, 4), backend=backend)


def summaries(x: Tensor, backend: str) -> Tensor:
    return summarise_blocks(x, 8, ("max", "avg"), backend=backend)


by_op = pytest.mark.parametrize("op", [attention, scores, summaries])


# How PyTorch itself differentiates forwards.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@by_op
def test_forward_gradients_are_left_to_others(level: str, op: Callable[[Tensor, str], Tensor]) -> None:
    x = torch.randn(1, 2, 40, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn_like(x))
        with pytest.raises(NotImplementedError, match="native: it has no backward"):
            op(dual, "native")
        if op is not scores:
            mine, wanted = (forward_ad.unpack_dual(op(dual, b)).tangent for b in ("auto", "reference"))
            torch.testing.assert_close(mine, wanted)
    assert op(x, "native").isfinite().all()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@by_op
def test_tensors_without_memory_are_refused(level: str, op: Callable[[Tensor, str], Tensor]) -> None:
    x = torch.randn(1, 2, 40, 16)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(
            NotImplementedError, match="kernels read memory, and a FakeTensor without any was given"
        ),
    ):
        op(mode.from_tensor(x), "native")
    with pytest.raises(NotImplementedError, match="read memory, and a Tensor without any"):
        torch.func.vmap(lambda one: op(one, "native"))(x[None])
