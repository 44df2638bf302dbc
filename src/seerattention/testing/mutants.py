"""Planted bugs: backends that are wrong in one way, which the checks of `conformance` must notice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import reference
from seerattention.ops.options import Options, PoolOptions
from seerattention.selection import BlockSelection
from seerattention.testing.conformance import Backend
from seerattention.testing.gradients import Attend, by_reference


@dataclass(frozen=True)
class Mutant:
    """A backend like another one but for a bug.

    Attributes:
        backend: The one that it calls.
    """

    backend: Backend

    def unsupported(self, *args: object, **kwargs: object) -> list[str]:
        """Return the reasons of the backend it calls."""
        return self.backend.unsupported(*args, **kwargs)


class WrongScale(Mutant):
    """The softmax scale is one percent too large."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention with the bug, ``[B, Hq, Tq, D]``, and lse."""
        return self.backend.run(q, k, v, selection, replace(options, scale=1.01 * options.scale))


class DroppedLastBlock(Mutant):
    """The loop over a row's blocks ends one too early, except in rows of one block."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention with the bug, ``[B, Hq, Tq, D]``, and lse."""
        mask = selection.to_mask()
        last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
        short = BlockSelection.from_mask(
            mask & ~(last & (mask.sum(-1, keepdim=True) > 1)), selection.block_size
        )
        return self.backend.run(q, k, v, short, options)


class SwappedHeadMap(Mutant):
    """Query head ``h`` reads KV head ``h % Hk`` instead of ``h // G``."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention with the bug, ``[B, Hq, Tq, D]``, and lse."""
        order = torch.arange(q.shape[1]).view(-1, k.shape[1]).T.flatten()
        mask = selection.to_mask().repeat_interleave(q.shape[1] // selection.shape[1], 1)
        moved = BlockSelection.from_mask(mask[:, order], selection.block_size)
        out = torch.empty_like(q)
        out[:, order], lse = self.backend.run(q[:, order], k, v, moved, options)
        return out, lse


@dataclass(frozen=True)
class ShiftedCausalLimit(Mutant):
    """A query sees ``shift`` keys too many (or too few) inside its selected blocks.

    The causal limit is out of a caller's reach, so this one computes by itself.

    Attributes:
        shift: Keys past the query's own that it sees.
    """

    shift: int = 1

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention with the bug, ``[B, Hq, Tq, D]``, and lse."""
        groups = q.shape[1] // k.shape[1]
        mask = selection.to_mask().repeat_interleave(q.shape[1] // selection.shape[1], 1)
        tokens = mask.repeat_interleave(selection.block_size[0], 2)[:, :, : q.shape[2]]
        tokens = tokens.repeat_interleave(selection.block_size[1], 3)[..., : k.shape[2]]
        limit = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        tokens = tokens & limit.tril(options.rows.first + self.shift)
        tokens = tokens.expand(q.shape[0], -1, -1, -1)
        scores = q @ k.repeat_interleave(groups, 1).mT * options.scale
        # A row that sees nothing returns zeros, as kernels do.
        share = torch.softmax(scores.masked_fill(~tokens, float("-inf")), -1).nan_to_num(0)
        values = v.repeat_interleave(groups, 1).masked_fill(~tokens.any(2)[..., None], 0)
        return share @ values, None


class ColumnNormalised(Mutant):
    """The pooled map's columns add up to 1 instead of its rows."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return output, map and lse with the bug."""
        out, target, lse = self.backend.run(q, k, v, block_size, options)
        return out, target / target.sum(-2, keepdim=True), lse


class LastRowsOnly(Mutant):
    """A query block's row of the map is that of its last query alone."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return output, map and lse with the bug."""
        out, _, lse = self.backend.run(q, k, v, block_size, options)
        _, rows, _ = self.backend.run(q, k, v, (1, block_size[1]), options)
        last = torch.arange(0, q.shape[2], block_size[0]) + block_size[0] - 1
        return out, rows[:, :, last.clamp(max=q.shape[2] - 1)], lse


class NormalisedBeforeGroup(Mutant):
    """Each head's rows are divided by their sums before the maximum over a group, and after it."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor | None, block_size: tuple[int, int], options: PoolOptions
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return output, map and lse with the bug."""
        out, target, lse = self.backend.run(q, k, v, block_size, replace(options, per_kv_head=False))
        if options.per_kv_head:
            target = target.unflatten(1, (k.shape[1], -1)).amax(2)
        return out, target / target.sum(-1, keepdim=True), lse


#: Bugs of a block-sparse attention kernel, planted into the reference.
ATTENTION_MUTANTS: dict[str, Mutant] = {
    "wrong scale": WrongScale(reference),
    "dropped last block": DroppedLastBlock(reference),
    "swapped head map": SwappedHeadMap(reference),
    "sees the next key": ShiftedCausalLimit(reference, 1),
    "misses its own key": ShiftedCausalLimit(reference, -1),
}


def _forgets_normaliser(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor]:
    """The softmax's denominator is taken for a constant, as where ``delta`` is left out."""
    out, lse = by_reference(q, k, v, selection, options)
    return out * (lse - lse.detach()).exp()[..., None].to(out.dtype), lse


def _forgets_scale(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor]:
    """The gradient of the keys is one percent too large."""
    return by_reference(q, 1.01 * k - 0.01 * k.detach(), v, selection, options)


def _forgets_head(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor]:
    """The last head of a group adds nothing to the gradients of its keys and values."""
    group = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(group, 1).unflatten(1, (-1, group)) for x in (k, v)]
    cut = [torch.cat([x[:, :, :-1], x[:, :, -1:].detach()], 2).flatten(1, 2) for x in wide]
    return by_reference(q, cut[0], cut[1], selection, options)


def _forgets_last_block(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor]:
    """The last of a row's blocks is left out of the gradients."""
    out, lse = by_reference(q, k, v, selection, options)
    short, _ = DroppedLastBlock(reference).run(q, k, v, selection, options)
    return out.detach() + short - short.detach(), lse


def _forgets_lse(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> tuple[Tensor, Tensor]:
    """The gradient of lse is half of what it is."""
    out, lse = by_reference(q, k, v, selection, options)
    return out, (lse + lse.detach()) / 2


#: Bugs of a backward, planted into the reference.
GRADIENT_MUTANTS: dict[str, Attend] = {
    "no normaliser": _forgets_normaliser,
    "wrong scale": _forgets_scale,
    "a head of a group missing": _forgets_head,
    "dropped last block": _forgets_last_block,
    "half the gradient of lse": _forgets_lse,
}
