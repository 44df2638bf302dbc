"""One operator for the backends with a ``backward`` of their own, which makes them differentiable.

Compilers of PyTorch take it too for a backend that they cannot look into, one with ``OPAQUE``.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.dispatch import outside_autocast
from seerattention.ops.operators import FLAT, as_told, flatten, like, told, unflatten
from seerattention.ops.options import Options
from seerattention.selection import BlockSelection


def run(
    backend: ModuleType, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Any]:
    """Return what a backend's ``run`` does; with a ``backward``, differentiable once in q, k, v and sinks."""
    inputs = (q, k, v, options.sinks)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    whole = hasattr(backend, "backward") or hasattr(backend, "OPAQUE")
    if not whole or not (learns or torch.compiler.is_compiling()):
        return backend.run(q, k, v, selection, options)
    return _attend(
        q, k, v, selection.bits, list(selection.block_size), selection.shape[3], *flatten(options),
        options.pages, options.rows.num_keys, learns or options.return_lse, backend.__name__,
    )  # fmt: skip


#: What the operators take besides tensors that have a gradient, as torch writes it.
_REST = (
    f"Tensor bits, int[] block_size, int columns, {FLAT}, Tensor? pages, SymInt num_keys, bool return_lse, "
    "str backend"
)


def _call(
    q: Tensor, bits: Tensor, block_size: list[int], columns: int, *rest: Any
) -> tuple[Any, BlockSelection, Options]:
    """Put together again what an operator cannot take."""
    *options, pages, num_keys, return_lse, backend = rest
    batch, heads, rows = bits.shape[:3]
    selection = BlockSelection(bits, (batch, heads, rows, columns), (block_size[0], block_size[1]))
    asked = unflatten(q.shape[2], num_keys, tuple(options))
    whole = Options(pages=pages, return_lse=return_lse, **asked)
    return importlib.import_module(backend), selection, whole


@torch.library.custom_op(
    "seerattention::block_sparse_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    module, selection, options = _call(q, *rest)
    return as_told(q, *module.run(q, k, v, selection, options))


@_attend.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return told(q, return_lse=rest[-2])


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
    module, selection, options = _call(q, *rest)
    dq, dk, dv, delta = module.backward(grad, grad_lse, q, k, v, out, lse, selection, options)
    dq, dk, dv = (like(x, of) for x, of in ((dq, q), (dk, k), (dv, v)))
    if options.sinks is None:
        return dq, dk, dv, q.new_empty(0)
    # A sink is a score like any other, whose value is zero.
    share = torch.exp(options.sinks.to(lse.dtype)[:, None] - lse)
    return dq, dk, dv, -(share * delta).sum((0, 2)).to(options.sinks.dtype)


@_differentiate.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = rest[6]
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bits, *settings, sinks, starts_q, starts_k, _, ctx.num_keys, _, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, bits, sinks, starts_q, starts_k)
    ctx.settings = settings


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *inputs, bits, sinks, starts_q, starts_k = ctx.saved_tensors
    # Of keys in pages there is no gradient.
    rest = bits, *ctx.settings, sinks, starts_q, starts_k, None, ctx.num_keys, True, ctx.backend
    dq, dk, dv, dsinks = _differentiate(grad, grad_lse, *inputs, *rest)
    return dq, dk, dv, *(None,) * 6, None if sinks is None else dsinks, *(None,) * 6


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "block_sparse_attention is differentiable once; use backend='reference' for gradients of gradients"
    )


_attend.register_autograd(_backward, setup_context=_keep)
_differentiate.register_autograd(_refuse)
