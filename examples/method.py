"""START HERE: the method in plain PyTorch, from queries and keys to the output, with the published gate."""

import math

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotate ``[B, H, N, D]`` to ``positions``, ``[N]``: the rotary embedding (RoPE)."""
    angle = (positions[:, None] * theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, density: float, block: int = 64
) -> tuple[Tensor, Tensor]:
    """Attend, for every block of queries, to the blocks of keys that the gate ranks highest.

    q is ``[B, Hq, T, D]``, k and v are ``[B, Hk, T, D]``, all before RoPE. ``weight``, ``[Hq, 3 * D, D]``, is
    what the gate learns. Returns the output ``[B, Hq, T, D]`` and the blocks read, bool ``[B, Hq, N, N]``.
    """
    tokens, dim = q.shape[2:]
    # Query heads of a group share keys and values, and may look at different blocks of them.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))

    # Pool: one summary per block, the mean of its queries; maximum, minimum and mean of its keys.
    q_gate = torch.stack([x.mean(2) for x in q.split(block, 2)], 2)
    pools = [torch.cat((x.amax(2), x.amin(2), x.mean(2)), -1) for x in k.split(block, 2)]
    # Project the keys' pools, rotate summaries to the first token of their block, score all pairs of blocks.
    k_gate = torch.stack(pools, 2) @ weight
    starts = torch.arange(0, tokens, block)
    scores = rotate(q_gate, starts) @ rotate(k_gate, starts).mT * dim**-0.5

    # Top-k: a row reads its own block first, then the best before it; k makes that `density` of the triangle.
    blocks = len(starts)
    count = max(1, int((1 - math.sqrt(1 - density)) * blocks))
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    ranked = scores.masked_fill(~causal, -math.inf).masked_fill(torch.eye(blocks).bool(), math.inf)
    read = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, ranked.topk(count).indices, True) & causal

    # Exact attention within the blocks read. A kernel skips the others; here they are masked.
    mask = read.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :tokens, :tokens].tril()
    q, k = (rotate(x, torch.arange(tokens)) for x in (q, k))
    weights = (q @ k.mT * dim**-0.5).masked_fill(~mask, -math.inf).softmax(-1)
    return weights @ v, read


if __name__ == "__main__":
    # A text that returns to eight subjects, block by block: queries look for keys of their own subject.
    torch.manual_seed(0)
    subject = torch.randn(8, 64)[torch.randint(8, (40,))].repeat_interleave(64, 0)
    q, k, v = (1.5 * subject + torch.randn(1, heads, len(subject), 64) for heads in (2, 1, 1))
    # A gate before it learns: it compares the means of two blocks.
    weight = torch.cat((torch.zeros(128, 64), torch.eye(64))).expand(2, -1, -1)
    dense, triangle = sparse_attention(q, k, v, weight, density=1)
    for out, read in (sparse_attention(q, k, v, weight, density) for density in (0.5, 0.2, 0.1, 0.05)):
        error = (out - dense).norm() / dense.norm()
        print(f"{read.sum() / triangle.sum():.1%} of the blocks read: {error:.1%} off dense attention")
