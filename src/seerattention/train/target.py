"""What gates learn to predict, on the rows that count, and how much of it a sparse selection would catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seerattention.ops.attention_scores import WORK_BYTES, attention_scores, by_block
from seerattention.ops.options import POOLS, Pool
from seerattention.policies import Rule, TopK
from seerattention.rows import Rows, num_blocks

#: Share of the rows, from the start, that objectives leave out: they see few blocks. Source: the published
#: code.
SKIPPED_ROWS = 0.25

#: Rows of query blocks of a sequence that teach a gate in a step, at most: a run of them, see `taught_rows`.
PREFILL_ROWS = 128

#: Query tokens of a sequence that teach a gate to choose while decoding. On the bundled teacher, at 4,096
#: tokens, their gradient has a cosine of 0.996 to that of all tokens (256 of them: 0.976); the gradients of
#: two texts have one of 0.94.
DECODE_ROWS = 1024

#: Rows on which recall is measured while training: all would cost a top-k of the whole map in every layer.
RECALL_ROWS = 64

#: Fewest blocks of a row whose recall is shown while training: any gate finds the row's own and the first.
LEAST_TAKEN = 3


#: What gates may learn of a block, `TrainConfig.target`, and the maps whose mean it is.
TARGETS: dict[str, tuple[Pool, ...]] = {**{pool: (pool,) for pool in POOLS}, "both": POOLS}


def mean_map(target: str, made: Callable[[Pool], Tensor]) -> Tensor:
    """Return the map to learn, rows of which sum to 1, from what makes the map of a pool."""
    maps = [made(pool) for pool in TARGETS[target]]
    return maps[0] if len(maps) == 1 else torch.stack(maps).mean(0)


class Counted(NamedTuple):
    """The rows of a phase that count; an objective's arguments.

    Attributes:
        target: fp32 ``[B, H, R, N]``; rows sum to 1.
        scores: fp32 ``[B, H, R, N]``, before softmax.
        valid: bool ``[R, N]``, the blocks that each row sees.
        always: bool ``[R, N]``, those of them that are read whatever their score: the first and the own.
    """

    target: Tensor
    scores: Tensor
    valid: Tensor
    always: Tensor


def taught_rows(num_tokens: int, block: int, place: float) -> Rows:
    """Return the queries of a sequence that teach: all, or of a long one a run of `PREFILL_ROWS` blocks.

    A step then costs little more than the model's forward pass, however long the sequence is.

    Args:
        num_tokens: Tokens of the sequence.
        block: Queries per row of blocks.
        place: Where the run lies among the rows that count, in [0, 1): another place in every step and layer.
    """
    blocks = num_blocks(num_tokens, block)
    first = int(SKIPPED_ROWS * blocks)
    if blocks - first <= PREFILL_ROWS:
        return Rows.last(num_tokens, num_tokens)
    first += int(place * (blocks - first - PREFILL_ROWS + 1))
    end = min((first + PREFILL_ROWS) * block, num_tokens)
    return Rows.at(first * block, end - first * block)


def counted(
    target: Tensor,
    scores: Tensor,
    block_size: tuple[int, int],
    num_tokens: int,
    *,
    taught: Rows | None = None,
) -> Counted:
    """Return the rows of a prefill's map that count.

    Args:
        target: fp32 ``[B, H, N, N]`` from `pooled_attention`, or ``[B, H, n, N']`` of ``taught``; rows sum
            to 1.
        scores: fp32, of the same shape, before softmax.
        block_size: Tokens per (query block, KV block).
        num_tokens: Tokens of the sequence.
        taught: Of which queries the map is, from `taught_rows`; default all.

    Returns:
        The last rows.
    """
    rows = taught or Rows.last(num_tokens, num_tokens)
    # A run of rows begins behind those that do not count.
    first = max(0, int(SKIPPED_ROWS * num_blocks(num_tokens, block_size[0])) - rows.first // block_size[0])
    valid, own = (mask(block_size, scores.device)[first:] for mask in (rows.causal, rows.own))
    return Counted(target[:, :, first:], scores[:, :, first:], valid, valid & _always(own))


def decode_counted(target: Tensor, scores: Tensor, rows: Tensor, size: int) -> Counted:
    """Return the same of single query tokens.

    Args:
        target: fp32 ``[B, Hk, R, N]`` from `decode_target`.
        scores: fp32 ``[B, Hk, R, N]``, before softmax.
        rows: int64 ``[R]``, the queries' positions.
        size: Keys per block.
    """
    valid = finished(rows, scores.shape[3], size)
    own = torch.arange(scores.shape[3], device=rows.device) == (rows // size)[:, None]
    return Counted(target, scores, valid, valid & _always(own))


def _always(own: Tensor) -> Tensor:
    """Add the first block to rows' own ones, bool ``[R, N]``."""
    first = torch.zeros_like(own)
    first[:, 0] = True
    return own | first


def decode_rows(num_tokens: int, device: torch.device | str | None = None) -> Tensor:
    """Return the positions of the query tokens that count, ascending, int64 ``[R]``.

    At most `DECODE_ROWS`, one of each of as many equal parts, at places in them that differ: evenly spaced
    ones would all lie at the same place of their blocks.
    """
    first = int(SKIPPED_ROWS * num_tokens)
    count = min(DECODE_ROWS, num_tokens - first)
    part = torch.arange(count + 1, device=device)
    edges = part * (num_tokens - first) // count
    # Multiples of the golden section fill the unit interval evenly.
    place = part[:-1].double() * (5**0.5 - 1) / 2 % 1
    return first + edges[:-1] + (place * edges.diff()).long()


def finished(rows: Tensor, blocks: int, size: int) -> Tensor:
    """Return which of so many blocks of ``size`` keys are finished for query tokens, bool ``[R, blocks]``.

    Args:
        rows: int64 ``[R]``, the queries' positions.
        blocks: Blocks of the sequence.
        size: Keys per block.
    """
    return (torch.arange(blocks, device=rows.device) + 1) * size <= rows[:, None] + 1


def decode_target(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    size: int,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    pool: Pool = "max",
) -> Tensor:
    """Return for some query tokens what they give to each block that is finished for them.

    Equal to rows of ``pooled_attention(..., (1, size), per_kv_head=True)``, divided by the sums over the
    finished blocks. Others are not computed, and logits exist in slices.

    Args:
        q: ``[B, Hq, T, D]``.
        k: ``[B, Hk, T, D]``.
        rows: int64 ``[R]``, positions of the query tokens, that each have a finished block.
        size: Keys per block.
        scale: Softmax scale.
        softcap: As `pooled_attention` takes it.
        sinks: As `pooled_attention` takes them.
        pool: As `pooled_attention` takes it.

    Returns:
        fp32 ``[B, Hk, R, N]``; rows sum to 1.

    Source: by the maximum, SeerAttention-R, section 3.2 (arXiv 2506.08889); without the block that decoding
        always reads.
    """
    groups, blocks = q.shape[1] // k.shape[1], num_blocks(k.shape[2], size)
    seen, parts = finished(rows, blocks, size), []
    # Of logarithms of weights.
    merged = torch.logsumexp if pool == "mass" else torch.amax
    step = max(
        1, WORK_BYTES["cpu" if q.device.type == "cpu" else "cuda"] // (4 * q[:, :, 0, 0].numel() * k.shape[2])
    )
    for part in rows.split(step):
        logits = attention_scores(q[:, :, part], k, part, scale=scale, softcap=softcap)
        total = logits.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(total.dtype)[:, None, None])
        heads = merged(by_block(logits, size, fill=float("-inf")), -1) - total
        parts.append(heads.unflatten(1, (-1, groups)).amax(2))
    return torch.cat(parts, 2).masked_fill(~seen, float("-inf")).softmax(-1).float()


def target_recall(
    target: Tensor, scores: Tensor, block_size: tuple[int, int], num_tokens: int, density: float
) -> float:
    """Return the share of the target's mass in what ``TopK(density, sink_blocks=1)`` takes by these scores.

    Args:
        target: fp32 ``[B, H, N, N]``; rows sum to 1.
        scores: fp32 ``[B, H, N, N]``, before softmax.
        block_size: Tokens per (query block, KV block).
        num_tokens: Tokens of the sequence.
        density: Fraction of the causally valid blocks.

    Returns:
        A number in [0, 1], the mean over the rows that the loss counts.
    """
    return float(
        sampled_recall(counted(target, scores, block_size, num_tokens), (density,), len(scores[0, 0]))[0]
    )


@torch.no_grad()
def sampled_recall(
    rows: Counted,
    densities: tuple[float, ...],
    most: int = RECALL_ROWS,
    least: int = 1,
) -> Tensor:
    """Return `target_recall` per density on at most ``most`` evenly spaced rows, on the device.

    Where a density comes to fewer blocks of a row than ``least``, these are taken.
    """
    last = len(rows.valid) - 1
    count = min(most, last + 1)
    some = torch.linspace(0, last, count, device=rows.valid.device, dtype=torch.float64).round().long()
    target, scores = rows.target[:, :, some], rows.scores[:, :, some]
    valid, always = rows.valid[some], rows.always[some]
    rules = [Rule("count", max(least, TopK(d).blocks(valid.shape[1]))) for d in densities]
    taken = (rule.choose(scores, valid, always) | always for rule in rules)
    return torch.stack([(target * mask).sum(-1).mean() for mask in taken])


def shown_density(density: float, num_blocks: int) -> float:
    """Return the density at which training shows recall: in a short sequence more than was asked for.

    Args:
        density: The one asked for.
        num_blocks: Blocks of the sequence.
    """
    taken = max(LEAST_TAKEN, TopK(density).blocks(num_blocks))
    return TopK(density, local_blocks=taken).always_density(num_blocks)
