"""What gradients of `block_sparse_attention` must be, as functions of what computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import block_sparse_attention, reference
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.ops.options import Options
from seerattention.selection import BlockSelection
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.poison import poison, unread_tokens

#: A differentiable function that returns output and lse.
Attend = Callable[[Tensor, Tensor, Tensor, BlockSelection, Options], tuple[Tensor, Tensor]]


def by_name(backend: str) -> Attend:
    """Return the public function with a backend chosen, its options taken apart."""

    def attend(*call: Any) -> tuple[Tensor, Tensor]:
        *given, options = call
        return block_sparse_attention(
            *given, scale=options.scale, softcap=options.softcap, sinks=options.sinks,
            return_lse=True, rows=options.rows, backend=backend,
        )  # fmt: skip

    return attend


def by_reference(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor]:
    """Return output and lse of the reference, which autograd differentiates."""
    out, lse = reference.run(q, k, v, selection, replace(options, return_lse=True))
    assert lse is not None
    return out, lse


@dataclass(frozen=True, eq=False)
class Call:
    """One differentiated call.

    Attributes:
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hk, Tk, D]``.
        v: ``[B, Hk, Tk, D]``.
        selection: The blocks to read.
        options: The options; ``sinks``, if there are any, are differentiated too.
        grad: Gradient of the output.
        grad_lse: Gradient of lse.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    selection: BlockSelection
    options: Options
    grad: Tensor
    grad_lse: Tensor

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Call:
        """Draw a call; half of the gradients of lse are zero, as where nobody asked for lse."""
        q, k, v = random_qkv(case, dtype=dtype, device=device)
        selection = random_selection(case, density=case.density, heads=case.selection_heads, device=device)
        grad, _, _ = random_qkv(case, dtype=dtype, device=device, seed=1)
        grad_lse = random_qkv(case, device=device, seed=2)[0][..., 0].clamp(min=0)
        return cls(q, k, v, selection, case.options(device), grad, grad_lse)

    def double(self) -> Call:
        """Return the call in fp64."""
        sinks = None if self.options.sinks is None else self.options.sinks.double()
        floats = {name: getattr(self, name).double() for name in ("q", "k", "v", "grad", "grad_lse")}
        return replace(self, options=replace(self.options, sinks=sinks), **floats)

    def gradients(self, attend: Attend) -> dict[str, Tensor]:
        """Return the gradients of q, k, v and sinks, if there are any."""
        given = {"q": self.q, "k": self.k, "v": self.v}
        if self.options.sinks is not None:
            given["sinks"] = self.options.sinks
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        options = replace(self.options, sinks=leaves.get("sinks"))
        outputs = attend(leaves["q"], leaves["k"], leaves["v"], self.selection, options)
        weights = [g.to(x.dtype) for g, x in zip((self.grad, self.grad_lse), outputs, strict=True)]
        return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), weights), strict=True))

    def budgets(self) -> dict[str, Budget]:
        """Return how far each gradient may be from the reference's in fp64.

        As every result twice the reference's own error and a rounding of the result; and what roundings of
        the two numbers per query do that a backward starts from. One is the sum over the output times its
        gradient: each output is rounded by itself to the dtype, and the sum in fp32. That acts like a
        gradient of lse. The other is lse, whose error scales the gradient of the output. So the reference
        says what either does.
        """
        plain, wide = self.gradients(by_reference), self.double()
        gold = wide.gradients(by_reference)
        out, lse = by_reference(wide.q, wide.k, wide.v, wide.selection, wide.options)
        own, sums = self.q.dtype, torch.promote_types(self.q.dtype, torch.float32)
        eps = torch.finfo(sums).eps
        products = wide.grad * out
        delta = torch.finfo(own).eps * products.square().sum(-1).sqrt() + eps * products.abs().sum(-1)
        shifted = replace(wide, grad=eps * lse[..., None] * wide.grad, grad_lse=delta)
        slack = shifted.gradients(by_reference)
        found = {}
        for name, x in plain.items():
            band = torch.finfo(x.dtype).eps * float(gold[name].abs().max())
            error = 2 * float((x.double() - gold[name]).abs().max())
            found[name] = Budget(gold[name], x.dtype, error + band + float(slack[name].abs().max()))
        return found


def check_gradients(
    attend: Attend, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    """Check every gradient within its budget, and that it is the same to the bit in a second run.

    In the second run keys and values that nobody reads are NaN, if there are any; their gradients are zero.

    Raises:
        AssertionError: If a gradient is none of that.
    """
    call = Call.of(case, dtype, device)
    found = call.gradients(attend)
    for name, budget in call.budgets().items():
        try:
            budget.check(found[name])
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
    again = call
    if not case.lengths:
        unread = unread_tokens(call.selection, case.kv_heads, case.keys).expand(call.k.shape[:3])
        k, v = poison(call.k, call.v, call.selection)
        again = replace(call, k=k, v=v)
        for name in ("k", "v"):
            assert not found[name][unread].any(), f"gradient of {name}: unread ones have one"
    for name, x in again.gradients(attend).items():
        assert torch.equal(x, found[name]), f"gradient of {name}: another run, or what is unread, changes it"
