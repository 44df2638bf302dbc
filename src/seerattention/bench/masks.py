"""Selections of a given density to time kernels on: random ones, a band, and a trained gate's.

All are built on the device head by head, since ``[Hq, N, N]`` scores at 256k tokens would take 2 GB.
Every row reads its own block and the first one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seerattention.measure import bundled
from seerattention.measure.maps import record_layers
from seerattention.ops.shapes import Shape
from seerattention.policies import TopK, select
from seerattention.rows import Rows, num_blocks
from seerattention.selection import BlockSelection

#: Kinds of masks.
MASKS = ("random", "group", "gate", "band")

#: How far a repeated passage's scores move, in standard deviations of the head's scores.
PASSAGE_SPREAD = 0.5


def full(shape: Shape, device: str) -> BlockSelection:
    """Select everything, with one list per head as the other masks have."""
    valid = Rows.last(shape.queries, shape.keys).causal(shape.block_size, device)
    return _each(shape.heads, shape, lambda head: valid)


def random(
    shape: Shape, density: float, device: str, seed: int = 0, lists: int | None = None
) -> BlockSelection:
    """Select each earlier block with probability ``density``.

    Args:
        shape: The sizes.
        density: The probability, in [0, 1].
        device: Where to build it.
        seed: Of the random numbers.
        lists: Heads of the selection; default one list per query head.

    Returns:
        The selection, ``[1, lists, Nq, Nk]``.
    """
    rows = Rows.last(shape.queries, shape.keys)
    valid, own = rows.causal(shape.block_size, device), rows.own(shape.block_size, device)
    own[:, 0] = True
    generator = torch.Generator(device=device).manual_seed(seed)

    def one(head: int) -> Tensor:
        draws = torch.rand(valid.shape, generator=generator, device=device)
        return ((draws < density) & valid) | own

    return _each(lists or shape.heads, shape, one)


def group(shape: Shape, density: float, device: str) -> BlockSelection:
    """Select as `random` does, with one list for all query heads of a KV head: ``[1, Hk, Nq, Nk]``."""
    return random(shape, density, device, lists=shape.kv_heads)


def band(shape: Shape, density: float, device: str) -> BlockSelection:
    """Select the first block and the latest ones, as many as ``TopK(density)`` reads."""
    rows = Rows.last(shape.queries, shape.keys)
    valid, own = rows.causal(shape.block_size, device), rows.own(shape.block_size, device)
    latest = max(1, TopK(density).blocks(valid.shape[1]) - 1)
    mask = TopK(density, sink_blocks=1, local_blocks=latest).always(own, valid)
    return _each(shape.heads, shape, lambda head: mask)


def gate(shape: Shape, density: float, device: str, scores: Tensor) -> BlockSelection:
    """Select by top-k over a trained gate's scores, laid out for this length.

    Args:
        shape: The sizes; square block sizes that are a power of two times the scores' blocks.
        density: As in ``TopK``.
        device: Where to build it.
        scores: fp32 ``[groups, heads per group, N0, N0]`` of blocks of 64 tokens, from `teacher_scores`.

    Returns:
        The selection, ``[1, Hq, Nq, Nk]``.
    """
    blocks = num_blocks(shape.keys, shape.block_size[1])
    policy = TopK(density, sink_blocks=1)
    group = shape.heads // shape.kv_heads
    coarse = _coarser(scores.to(device), shape.block_size[1] // 64)
    chosen = pick_heads(coarse.shape[0], coarse.shape[1], shape.kv_heads, group)

    def one(head: int) -> Tensor:
        at, inside = chosen[head]
        longer = lay_out(coarse[at, inside], blocks, seed=at)[None, None]
        rows = Rows.last(shape.queries, shape.keys)
        return select(policy, longer, rows=rows, block_size=shape.block_size).to_mask()[0, 0]

    return _each(shape.heads, shape, one)


def pick_heads(groups: int, per_group: int, wanted_groups: int, wanted_heads: int) -> list[tuple[int, int]]:
    """Return which (group, head) of the trained model stands for each query head wanted.

    Groups are spread over the layers. Where a group has fewer heads than wanted, heads of the next
    group, mostly of the same layer, follow.
    """
    found = []
    for i in range(wanted_groups):
        first = i * groups // wanted_groups if wanted_groups <= groups else i % groups
        for j in range(wanted_heads):
            found.append(((first + j // per_group) % groups, j % per_group))
    return found


def lay_out(scores: Tensor, blocks: int, seed: int) -> Tensor:
    """Lay out block scores ``[N0, N0]`` for a longer sequence of ``blocks`` blocks.

    What is near keeps its place relative to the diagonal and the first block stays the first, both at
    their own size. What is far repeats the lower left quarter of the map, the scores of late queries
    for early keys, passage after passage; each repetition is raised or lowered by a random amount that
    the heads of a group share. Enlarging the map instead would make every block a square of equal
    blocks, and neighbouring rows would share far more than they do.

    Args:
        scores: fp32 ``[N0, N0]``, before softmax.
        blocks: Blocks wanted; up to ``N0`` the map is cut.
        seed: Of the passages' amounts.

    Returns:
        fp32 ``[blocks, blocks]``; acausal entries mean nothing.
    """
    known = scores.shape[0]
    if blocks <= known:
        return scores[:blocks, :blocks]
    half = known // 2
    row = torch.arange(blocks, device=scores.device)[:, None]
    column = torch.arange(blocks, device=scores.device)[None]
    distance = row - column
    source_row = torch.where(row < known, row, half + (row - known) % half)
    far = 1 + (column - 1) % (half - 1)
    source_column = torch.where(distance < half, source_row - distance, far)
    source_column = torch.where(row < known, column, source_column)
    source_column = torch.where(column == 0, 0, source_column).clamp(0, known - 1)
    generator = torch.Generator().manual_seed(seed)
    passages = blocks // (half - 1) + 1
    amounts = torch.randn(passages, passages, generator=generator).to(scores.device)
    causal = scores[torch.ones_like(scores, dtype=torch.bool).tril()]
    passage = ((row - known) // half).clamp(min=0), (column - 1).clamp(min=0) // (half - 1)
    moved = PASSAGE_SPREAD * causal[causal.isfinite()].std() * amounts[passage]
    repeated = (distance >= half) & (row >= known) & (column > 0)
    return scores[source_row, source_column] + torch.where(repeated, moved, 0.0)


def _coarser(scores: Tensor, factor: int) -> Tensor:
    """Reduce scores to blocks ``factor`` times as large: a block is as good as its best part."""
    if factor <= 1:
        return scores
    size = scores.shape[-1] // factor * factor
    tail = scores[..., :size, :size].unflatten(-1, (-1, factor)).amax(-1)
    return tail.unflatten(-2, (-1, factor)).amax(-2)


def _each(lists: int, shape: Shape, mask: Callable[[int], Tensor]) -> BlockSelection:
    """Build a selection from one bool ``[Nq, Nk]`` mask per list."""
    heads = [
        BlockSelection.from_mask(mask(head)[None, None], shape.block_size, check=False)
        for head in range(lists)
    ]
    _, _, nq, nk = heads[0].shape
    return BlockSelection(torch.cat([one.bits for one in heads], 1), (1, lists, nq, nk), shape.block_size)


def teacher_scores(device: str, tokens: int = 8192) -> Tensor:
    """Return the bundled gates' scores on the bundled text, one group of heads per (layer, KV head).

    Args:
        device: Where to run the bundled teacher.
        tokens: Length of the text; 64 tokens make a block.

    Returns:
        fp32 ``[layers * Hk, G, N0, N0]``, before softmax, -inf where acausal.
    """
    model, tokenizer = bundled.named_model(bundled.BUNDLED, device=device)
    found = record_layers(
        model,
        bundled.load_teacher_gates().to(device),
        [bundled.text_tokens(tokenizer)[1][:tokens]],
        lambda call, gate, scores: scores[0].unflatten(0, (call.k.shape[1], -1)),
    )
    return torch.cat([scores for (scores,) in found.values()])
