"""Distillation of texts that processes share, for those longer than one GPU takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from seerattention.hosts.transformers import AttentionCall
from seerattention.ops.dense_attention import dense_attention
from seerattention.parallel.context import Context, Exchange
from seerattention.rows import Rows, num_blocks
from seerattention.train.target import SKIPPED_ROWS, taught_rows


class SharedText:
    """A batch of texts of one length, of which every process has an early chunk and a late one.

    Args:
        rows: Texts.
        tokens: Of each.
        block: Tokens per block of the gates.
    """

    def __init__(self, rows: int, tokens: int, block: int) -> None:
        assert dist.group.WORLD is not None
        self.length, self.block = tokens, block
        self.context = Context(dist.group.WORLD, block, [tokens] * rows)
        self.context.add_piece(tokens)

    def part(self, whole: Tensor) -> Tensor:
        """Return this process's tokens of ``[..., T]``, padded by zeros to whole chunks."""
        parts = []
        for chunk in self.context.latest:
            here = whole[..., chunk.where]
            parts.append(F.pad(here, (0, chunk.tokens - here.shape[-1])))
        return torch.cat(parts, -1)

    def keys(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and keys before RoPE of the whole text, ``[B, Hk, T, D]`` each."""
        exchange = Exchange(self.context, call.k, call.v)
        nope = torch.empty_like(exchange.k)
        self.context.in_order(call.k_nope, nope)
        exchange.wait()
        k, v, nope = (x[:, :, : self.length] for x in (exchange.k, exchange.v, nope))
        return k, v, nope

    def dense(self, call: AttentionCall, k: Tensor, v: Tensor) -> Tensor:
        """Return dense attention of this process's queries, of ``call.q``'s shape, zeros for padding."""
        out, options = torch.zeros_like(call.q), {"softcap": call.softcap, "sinks": call.sinks}
        for chunk in self.context.latest:
            if (end := min(self.length, chunk.first + chunk.tokens)) > chunk.first:
                here = slice(chunk.place, chunk.place + end - chunk.first)
                keys, values = k[:, :, :end], v[:, :, :end]
                out[:, :, here] = dense_attention(
                    call.q[:, :, here], keys, values, scale=call.scale, **options
                )
        return out

    def taught(self, place: float) -> Iterator[tuple[Rows, slice, float]]:
        """Iterate over this process's queries of those that teach, their places, and their share of all.

        Args:
            place: See `taught_rows`, whose rows those of all processes are.
        """
        whole = taught_rows(self.length, self.block, place)
        skipped = int(SKIPPED_ROWS * num_blocks(self.length, self.block)) * self.block
        first = max(whole.first, skipped)
        rows = num_blocks(whole.num_keys - first, self.block)
        for chunk in self.context.latest:
            begin = max(first, chunk.first)
            end = min(whole.num_keys, chunk.first + chunk.tokens)
            if begin < end:
                here = slice(chunk.place + begin - chunk.first, chunk.place + end - chunk.first)
                yield Rows.at(begin, end - begin), here, num_blocks(end - begin, self.block) / rows
