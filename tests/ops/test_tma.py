"""What can be asked of tensors that have no memory, as those of `torch.func`: they go to other backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.summarise_blocks import summarise_blocks
from seerattention.ops.tma import aligned, can_copy
from seerattention.rows import Rows

FULL = BlockSelection.full(Rows.last(40, 40), (16, 16))
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: block_sparse_attention(x, x, x, FULL),
    "summaries": lambda x: summarise_blocks(x, 8, ("max", "avg")),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
def test_only_what_lies_in_memory_is_aligned() -> None:
    x = torch.randn(1, 2, 40, 16)
    assert aligned(x)
    assert can_copy(x)
    assert not aligned(x.flatten()[1:])
    with FakeTensorMode() as mode:
        assert not aligned(mode.from_tensor(x))
    seen = []
    torch.func.vmap(lambda one: seen.append((aligned(one), can_copy(one))) or one)(x[None])
    assert seen == [(False, False)]


@pytest.mark.parametrize("name", list(OPS))
def test_auto_runs_in_transforms(name: str) -> None:
    op, x = OPS[name], torch.randn(3, 1, 2, 40, 16)
    torch.testing.assert_close(torch.func.vmap(op)(x), torch.stack([op(one) for one in x]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_gradients_by_torch_func() -> None:
    x, towards = torch.randn(2, 1, 2, 40, 16)

    def by(backend: str) -> Tensor:
        return torch.func.jvp(
            lambda x: block_sparse_attention(x, x, x, FULL, backend=backend), (x,), (towards,)
        )[1]

    torch.testing.assert_close(by("auto"), by("reference"))
