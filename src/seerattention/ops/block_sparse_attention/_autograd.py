"""What makes a backend differentiable that comes with a ``backward`` of its own.

One operator for all of them, so that compilers see a call, its shapes and its gradient, and no kernels.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.dispatch import outside_autocast
from seerattention.ops.options import Options
from seerattention.rows import Rows
from seerattention.selection import BlockSelection


def wanted(*inputs: Tensor | None) -> bool:
    """Whether a gradient of one of the inputs is asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor]:
    """Return what the backend's ``run`` does, differentiable once in q, k, v and sinks.

    Args:
        backend: The full name of its module, which has a function ``backward``.
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hk, Tk, D]``.
        v: ``[B, Hk, Tk, D]``.
        selection: The blocks to read.
        options: The options.
    """
    return _attend(
        q, k, v, selection.bits, list(selection.block_size), selection.shape[3], options.scale,
        options.softcap, options.sinks, **options.starts, backend=backend,
    )  # fmt: skip


#: What the operators take besides tensors that have a gradient, as torch writes it.
_REST = (
    "Tensor bits, int[] block_size, int columns, float scale, float? softcap, Tensor? sinks, "
    "Tensor? starts_q, Tensor? starts_k, str backend"
)


def _call(
    q: Tensor, k: Tensor, bits: Tensor, block_size: list[int], columns: int, scale: float,
    softcap: float | None, sinks: Tensor | None, starts_q: Tensor | None, starts_k: Tensor | None,
    backend: str,
) -> tuple[Any, BlockSelection, Options]:  # fmt: skip
    """Put together again what an operator cannot take."""
    block_q, block_k = block_size
    batch, heads, rows = bits.shape[:3]
    selection = BlockSelection(bits, (batch, heads, rows, columns), (block_q, block_k))
    where = Rows(q.shape[2], k.shape[2], starts_q, starts_k)
    options = Options(rows=where, scale=scale, softcap=softcap, sinks=sinks, return_lse=True)
    return importlib.import_module(backend), selection, options


@torch.library.custom_op(
    "seerattention::block_sparse_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    module, selection, options = _call(q, k, *rest)
    out, lse = module.run(q, k, v, selection, options)
    # A compiler is told one layout, whatever the backend's is.
    return out.contiguous(), lse.contiguous()


@_attend.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op(
    "seerattention::block_sparse_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@outside_autocast
def _differentiate(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module, selection, options = _call(q, k, *rest)
    dq, dk, dv, delta = module.backward(grad, grad_lse, q, k, v, out, lse, selection, options)
    if options.sinks is None:
        return dq, dk, dv, q.new_empty(0)
    # A sink is a score like any other, whose value is zero.
    share = torch.exp(options.sinks.to(lse.dtype)[:, None] - lse)
    return dq, dk, dv, -(share * delta).sum((0, 2)).to(options.sinks.dtype)


@_differentiate.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = rest[5]
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bits, *settings, sinks, starts_q, starts_k, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, bits, sinks, starts_q, starts_k)
    ctx.settings = settings


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *inputs, bits, sinks, starts_q, starts_k = ctx.saved_tensors
    rest = bits, *ctx.settings, sinks, starts_q, starts_k, ctx.backend
    dq, dk, dv, dsinks = _differentiate(grad, grad_lse, *inputs, *rest)
    return dq, dk, dv, *(None,) * 5, None if sinks is None else dsinks, None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "block_sparse_attention is differentiable once; use backend='reference' for gradients of gradients"
    )


_attend.register_autograd(_backward, setup_context=_keep)
_differentiate.register_autograd(_refuse)
