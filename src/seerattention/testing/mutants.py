"""Planted bugs: backends that are wrong in one way, which the checks of `conformance` must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seerattention.ops.block_sparse_attention import reference
from seerattention.ops.options import Options
from seerattention.selection import BlockSelection
from seerattention.testing.conformance import Backend
from seerattention.testing.gradients import Attend, by_reference

#: What a backend's ``run`` returns: attention and lse, or attention, map and lse.
Result = tuple[Any, ...]
Run = Callable[..., Result]


@dataclass(frozen=True)
class Mutant:
    """A backend like another one but for a bug.

    Attributes:
        bug: Computes the op by the backend's ``run``, its first argument, and wrongly.
        backend: The one whose ``run`` that is.
    """

    bug: Run
    backend: Backend

    def unsupported(self, *args: object, **kwargs: object) -> list[str]:
        """Return the reasons of the backend it calls."""
        return self.backend.unsupported(*args, **kwargs)

    def run(self, *args: Any) -> Result:
        """Return what the bug makes of it."""
        return self.bug(self.backend.run, *args)


def wrong_scale(run: Run, *call: Any) -> Result:
    """The softmax scale is one percent too large."""
    *given, options = call
    return run(*given, replace(options, scale=1.01 * options.scale))


def dropped_last_block(
    run: Run, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> Result:
    """The loop over a row's blocks ends one too early, except in rows of one block."""
    mask = selection.to_mask()
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    short = mask & ~(last & (mask.sum(-1, keepdim=True) > 1))
    return run(q, k, v, BlockSelection.from_mask(short, selection.block_size), options)


def swapped_head_map(
    run: Run, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options
) -> Result:
    """Query head ``h`` reads KV head ``h % Hk`` instead of ``h // G``."""
    order = torch.arange(q.shape[1]).view(-1, k.shape[1]).T.flatten()
    mask = selection.to_mask().repeat_interleave(q.shape[1] // selection.shape[1], 1)
    moved = BlockSelection.from_mask(mask[:, order], selection.block_size)
    out = torch.empty_like(q)
    out[:, order], lse = run(q[:, order], k, v, moved, options)
    return out, lse


def shifted_causal_limit(
    run: object, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: Options, *, shift: int
) -> Result:
    """A query sees ``shift`` keys too many (or too few) inside its selected blocks.

    The causal limit is out of a caller's reach, so this one computes by itself.
    """
    groups = q.shape[1] // k.shape[1]
    mask = selection.to_mask().repeat_interleave(q.shape[1] // selection.shape[1], 1)
    tokens = mask.repeat_interleave(selection.block_size[0], 2)[:, :, : q.shape[2]]
    tokens = tokens.repeat_interleave(selection.block_size[1], 3)[..., : k.shape[2]]
    limit = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    tokens = tokens & limit.tril(options.rows.first + shift)
    tokens = tokens.expand(q.shape[0], -1, -1, -1)
    scores = q @ k.repeat_interleave(groups, 1).mT * options.scale
    # A row that sees nothing returns zeros, as kernels do.
    share = torch.softmax(scores.masked_fill(~tokens, float("-inf")), -1).nan_to_num(0)
    values = v.repeat_interleave(groups, 1).masked_fill(~tokens.any(2)[..., None], 0)
    return share @ values, None


def column_normalised(run: Run, *call: Any) -> Result:
    """The pooled map's columns add up to 1 instead of its rows."""
    out, target, lse = run(*call)
    return out, target / target.sum(-2, keepdim=True), lse


def last_rows_only(
    run: Run, q: Tensor, k: Tensor, v: Tensor, block_size: tuple[int, int], options: Any
) -> Result:
    """A query block's row of the map is that of its last query alone."""
    out, _, lse = run(q, k, v, block_size, options)
    _, rows, _ = run(q, k, v, (1, block_size[1]), options)
    last = torch.arange(0, q.shape[2], block_size[0]) + block_size[0] - 1
    return out, rows[:, :, last.clamp(max=q.shape[2] - 1)], lse


def normalised_before_group(run: Run, q: Tensor, k: Tensor, *rest: Any) -> Result:
    """Each head's rows are divided by their sums before the heads of a group are merged, and after it."""
    *given, options = rest
    out, target, lse = run(q, k, *given, replace(options, per_kv_head=False))
    if options.per_kv_head:
        target = options.merged(target.unflatten(1, (k.shape[1], -1)), 2)
    return out, target / target.sum(-1, keepdim=True), lse


def other_pool(run: Run, *call: Any) -> Result:
    """A block gets the largest of its weights where their sum was asked for, and the other way round."""
    *given, options = call
    return run(*given, replace(options, pool="max" if options.pool == "mass" else "mass"))


#: Bugs of a block-sparse attention kernel, planted into the reference.
ATTENTION_MUTANTS = {
    "wrong scale": Mutant(wrong_scale, reference),
    "dropped last block": Mutant(dropped_last_block, reference),
    "swapped head map": Mutant(swapped_head_map, reference),
    "sees the next key": Mutant(partial(shifted_causal_limit, shift=1), reference),
    "misses its own key": Mutant(partial(shifted_causal_limit, shift=-1), reference),
}


def _forgets_normaliser(*call: Any) -> tuple[Tensor, Tensor]:
    """The softmax's denominator is taken for a constant, as where ``delta`` is left out."""
    out, lse = by_reference(*call)
    return out * (lse - lse.detach()).exp()[..., None].to(out.dtype), lse


def _forgets_scale(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the keys is one percent too large."""
    return by_reference(q, 1.01 * k - 0.01 * k.detach(), *rest)


def _forgets_head(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The last head of a group adds nothing to the gradients of its keys and values."""
    group = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(group, 1).unflatten(1, (-1, group)) for x in (k, v)]
    cut = [torch.cat([x[:, :, :-1], x[:, :, -1:].detach()], 2).flatten(1, 2) for x in wide]
    return by_reference(q, cut[0], cut[1], *rest)


def _forgets_last_block(*call: Any) -> tuple[Tensor, Tensor]:
    """The last of a row's blocks is left out of the gradients."""
    out, lse = by_reference(*call)
    short, _ = dropped_last_block(reference.run, *call)
    return out.detach() + short - short.detach(), lse


def _forgets_lse(*call: Any) -> tuple[Tensor, Tensor]:
    """The gradient of lse is half of what it is."""
    out, lse = by_reference(*call)
    return out, (lse + lse.detach()) / 2


#: Bugs of a backward, planted into the reference.
GRADIENT_MUTANTS: dict[str, Attend] = {
    "no normaliser": _forgets_normaliser,
    "wrong scale": _forgets_scale,
    "a head of a group missing": _forgets_head,
    "dropped last block": _forgets_last_block,
    "half the gradient of lse": _forgets_lse,
}
