"""Attention of few query tokens over the KV blocks that each of them selected: a step of decoding."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import Attended
from seerattention.ops.dispatch import check_cache, check_selection, choose, load_backends, outside_autocast
from seerattention.ops.operators import as_told, told
from seerattention.ops.options import DecodeOptions
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

BACKENDS = load_backends(__name__, __path__)

#: What ``auto`` tries, in order; ``reference`` copies the cache and is never chosen.
ORDER = ("triton", "gather")


@outside_autocast
def block_sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | Attended:
    """Compute softmax attention in which every query token reads only the KV blocks that it selected.

    The queries are the last tokens of their sequences: one in plain decoding, a few where drafted tokens are
    verified, each with a selection of its own. Lengths, pages and starts are read on the device, so that a
    captured graph stays right while they change in place. There is no gradient.

    Args:
        q: ``[B, Hq, Tq, D]``, any floating-point dtype.
        k: ``[B, Hk, Tk, D]``, ``Hk`` a divisor of ``Hq``: a cache, whose sequences may end before ``Tk``.
            With ``pages`` ``[P, Hk, page, D]``, a page being one block's tokens or several blocks'.
        v: Shaped as k.
        selection: Blocks of ``(1, b)`` tokens: a row per query token, as many columns as the cache has blocks
            of ``b`` tokens. Its batch is B or 1, its heads 1, Hk (read once for a whole group) or Hq. Blocks
            after a query are not read. What a query does not read does not influence its output, whatever it
            holds; one that reads nothing gets zeros.
        lengths: int32 ``[B]``, keys of every sequence, those of the queries included, at most as many as
            the cache can hold, which is the default. On a GPU nobody checks them.
        pages: int32 ``[B, N]``, a block table: where in k and v the pages of every sequence are, in order.
            Entries past a sequence's length are not read.
        starts: int32 ``[B]``, where in k and v every sequence's first key lies, as padding on the left leaves
            it: blocks and lengths count from there. Default 0. Not with pages.
        scale: Softmax scale; default ``D ** -0.5``.
        softcap: Scores become ``softcap * tanh(scores * scale / softcap)``.
        sinks: Floating point ``[Hq]``, a logit per head that takes part in the softmax's denominator only.
        return_lse: Also return the logarithm of the softmax's denominator, sinks included.
        backend: ``auto``, or a name of ``BACKENDS``, which then runs or raises.

    Returns:
        ``[B, Hq, Tq, D]`` in the dtype of q; with ``return_lse`` a pair, `Attended`.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If shapes, devices, options or the selection do not fit, or the backend is unknown.
        NotImplementedError: If the backend cannot run this, with its reasons.

    Source: SeerAttention-R, section 3.3 (arXiv 2506.08889).
    """
    check_cache(q, k, v)
    q, k, v = q.detach(), k.detach(), v.detach()
    sinks = None if sinks is None else sinks.detach()
    options = DecodeOptions.of(
        q, k, lengths=lengths, pages=pages, starts=starts, scale=scale, softcap=softcap, sinks=sinks,
        return_lse=return_lse,
    )  # fmt: skip
    _check_selection(q, k, selection, options)
    args = {"q": q, "k": k, "v": v, "selection": selection, "options": options}
    module = choose(BACKENDS, ORDER, backend, **args)
    if not torch.compiler.is_compiling():
        out, lse = module.run(**args)
    else:
        out, lse = _operator(
            q, k, v, selection.bits, selection.shape[3], selection.block_size[1], options.scale, softcap,
            sinks, lengths, pages, starts, return_lse, module.__name__,
        )  # fmt: skip
    return Attended(out, lse) if return_lse else out


@torch.library.custom_op("seerattention::block_sparse_decode", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    columns: int,
    block: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    lengths: Tensor | None,
    pages: Tensor | None,
    starts: Tensor | None,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens = bits.shape[:3]
    selection = BlockSelection(bits, (batch, heads, tokens, columns), (1, block))
    options = DecodeOptions.of(
        q, k, lengths=lengths, pages=pages, starts=starts, scale=scale, softcap=softcap, sinks=sinks,
        return_lse=return_lse,
    )  # fmt: skip
    return as_told(q, *importlib.import_module(backend).run(q, k, v, selection, options))


@_operator.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return told(q, return_lse=rest[-2])


def _check_selection(q: Tensor, k: Tensor, selection: BlockSelection, options: DecodeOptions) -> None:
    nq, nk = selection.shape[2:]
    block_q, block_k = selection.block_size
    if block_q != 1:
        raise ValueError(
            f"decoding selects for every token alone, blocks of (1, b), got {selection.block_size}"
        )
    if options.page_tokens % block_k and options.pages is not None:
        raise ValueError(f"a page of {options.page_tokens} tokens must hold whole blocks of {block_k}")
    need = q.shape[2], num_blocks(options.rows.num_keys, block_k)
    if (nq, nk) != need:
        raise ValueError(
            f"the selection has {nq} rows of {nk} blocks, but {need[0]} query tokens and a cache of "
            f"{options.rows.num_keys} tokens make {need[0]} of {need[1]}; select again for this cache"
        )
    check_selection(q, k, selection)
