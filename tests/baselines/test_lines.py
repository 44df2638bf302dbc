"""Verticals and slashes, estimated from the last queries: MInference and FlexPrefill."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from seerattention import TokenBudget, TopK, TopP, baselines, causal_blocks, select_blocks
from seerattention.baselines.flexprefill import FlexPrefill, root_divergence
from seerattention.baselines.minference import MInference
from seerattention.ops.shapes import Shape
from seerattention.policies import Policy, select
from seerattention.rows import Rows, num_blocks
from seerattention.scorer import Scorer
from seerattention.testing.inputs import random_qkv

HEADS, KV_HEADS, DIM = 4, 2, 16
LENGTHS = [(1, 1), (15, 15), (17, 17), (70, 70), (37, 83), (32, 96), (1, 50)]
BLOCKS = [(16, 16), (8, 16), (16, 8)]

#: The query's own block of 32 tokens and one more.
TWO = TokenBudget(64)


def inputs(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    shape = Shape(name="", heads=HEADS, kv_heads=KV_HEADS, queries=queries, keys=keys, head_dim=DIM, batch=2)
    q, k, _ = random_qkv(shape)
    # Attention that is far from even, so that lines and blocks differ.
    return 3 * q, k


def scores_of(scorer: Scorer, q: Tensor, k: Tensor) -> Tensor:
    tokens = k.shape[2]
    k_blocks = scorer.compress(k, positions=torch.arange(tokens))
    valid = causal_blocks(q.shape[2], tokens, scorer.block_size)
    return scorer.score(q, k_blocks, positions=torch.arange(tokens - q.shape[2], tokens), valid=valid)


def selected(scorer: Scorer, q: Tensor, k: Tensor, policy: Policy) -> Tensor:
    positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    k_blocks = scorer.compress(k, positions=torch.arange(k.shape[2]))
    return select_blocks(
        q,
        k_blocks,
        scorer,
        policy,
        rows=Rows.last(q.shape[2], k.shape[2]),
        positions=positions,
        backend="reference",
    ).to_mask()


def slow_lines(q: np.ndarray, k: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean weight of each key and each distance over the last queries of one head."""
    past = len(k) - len(q)
    rows = range(max(0, len(q) - last), len(q))
    vertical, slash = np.zeros(len(k)), np.zeros(len(k))
    for r in rows:
        weights = [math.exp(float(q[r] @ k[c]) / math.sqrt(len(k[c]))) for c in range(past + r + 1)]
        for c, weight in enumerate(weights):
            vertical[c] += weight / sum(weights) / len(rows)
            slash[past + r - c] += weight / sum(weights) / len(rows)
    return vertical, slash


def slow_minference(q: np.ndarray, k: np.ndarray, block_size: tuple[int, int], last: int) -> np.ndarray:
    (block_q, block_k), past = block_size, len(k) - len(q)
    vertical, slash = slow_lines(q, k, last)
    out = np.zeros((num_blocks(len(q), block_q), num_blocks(len(k), block_k)))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            for c in range(j * block_k, min(len(k), (j + 1) * block_k)):
                out[i, j] = max(out[i, j], vertical[c])
                for r in range(i * block_q, min(len(q), (i + 1) * block_q)):
                    if c <= past + r:
                        out[i, j] = max(out[i, j], slash[past + r - c])
    return np.log(out)


def slow_divergence(p: list[float], q: list[float]) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        for x in (a, b):
            total += 0.5 * x * math.log(x / ((a + b) / 2)) if x > 0 else 0
    return math.sqrt(max(total, 0))


def slow_flexprefill(
    q: np.ndarray, k: np.ndarray, block_size: tuple[int, int], tau: float
) -> tuple[np.ndarray, float]:
    """Scores of one head and its divergence."""
    (block_q, block_k), past = block_size, len(k) - len(q)
    vertical, slash = slow_lines(q, k, block_q)
    nq, nk = num_blocks(len(q), block_q), num_blocks(len(k), block_k)
    columns = [range(j * block_k, min(len(k), (j + 1) * block_k)) for j in range(nk)]
    mean_k = [sum(k[c] for c in block) / len(block) for block in columns]
    latest = sum(q[r] for r in range(max(0, len(q) - block_q), len(q))) / min(len(q), block_q)
    estimate = [math.exp(float(latest @ mean) / math.sqrt(len(mean))) for mean in mean_k]
    estimate = [e / sum(estimate) for e in estimate]
    true = [float(sum(vertical[c] for c in block)) for block in columns]
    divergence = slow_divergence(estimate, true)
    out = np.full((nq, nk), -np.inf)
    for i in range(nq):
        rows = range(i * block_q, min(len(q), (i + 1) * block_q))
        mean_q = sum(q[r] for r in rows) / len(rows)
        last_row = past + rows[-1]
        for j, block in enumerate(columns):
            if block[0] > last_row:
                continue
            if divergence < tau:
                out[i, j] = float(mean_q @ mean_k[j]) / math.sqrt(len(mean_q))
            else:
                diagonals = sum(slash[last_row - c] for c in block if c <= last_row)
                out[i, j] = math.log(max(true[j], diagonals))
    return out, divergence


def heads(q: Tensor, k: Tensor) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Every (batch, query head) with its queries and its group's keys."""
    pairs = [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]
    group = q.shape[1] // k.shape[1]
    return [(b, h, q[b, h].double().numpy(), k[b, h // group].double().numpy()) for b, h in pairs]


def check_scores_and_selections(actual: Tensor, expected: Tensor, q: Tensor, k: Tensor, block: tuple) -> None:
    """Compare scores where they are valid, and what two policies make of either."""
    assert actual.dtype == torch.float32
    valid = causal_blocks(q.shape[2], k.shape[2], block)
    torch.testing.assert_close(actual[..., valid], expected[..., valid], atol=2e-5, rtol=2e-5)
    assert (actual[..., ~valid] == -torch.inf).all()
    for policy in (TopK(0.4), TopP(0.7)):
        sizes = {"rows": Rows.last(q.shape[2], k.shape[2]), "block_size": block}
        assert torch.equal(
            select(policy, actual, **sizes).to_mask(), select(policy, expected, **sizes).to_mask()
        )


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
def test_minference(block_size: tuple[int, int], queries: int, keys: int) -> None:
    q, k = inputs(queries, keys)
    actual = scores_of(MInference(block_size, last_queries=24), q, k)
    expected = torch.zeros(actual.shape)
    for b, h, one_q, one_k in heads(q, k):
        expected[b, h] = torch.from_numpy(slow_minference(one_q, one_k, block_size, 24))
    check_scores_and_selections(actual, expected, q, k, block_size)


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("block_size", BLOCKS)
def test_flexprefill(block_size: tuple[int, int], queries: int, keys: int) -> None:
    q, k = inputs(queries, keys)
    # Between the heads' divergences, so that both kinds of heads are compared; one block is all alike.
    divergences = sorted(slow_flexprefill(*qk, block_size, 0)[1] for _, _, qk in pairs(q, k))
    tau = (divergences[3] + divergences[4]) / 2 if keys > block_size[1] else 0.1
    actual = scores_of(FlexPrefill(block_size, tau=tau), q, k)
    expected = torch.zeros(actual.shape)
    for b, h, (one_q, one_k) in pairs(q, k):
        expected[b, h] = torch.from_numpy(slow_flexprefill(one_q, one_k, block_size, tau)[0])
    check_scores_and_selections(actual, expected, q, k, block_size)


def pairs(q: Tensor, k: Tensor) -> list[tuple[int, int, tuple[np.ndarray, np.ndarray]]]:
    return [(b, h, (one_q, one_k)) for b, h, one_q, one_k in heads(q, k)]


def test_divergence() -> None:
    p, q = torch.rand(3, 20), torch.rand(3, 20)
    p[:, :5] = 0
    q[:, 3:8] = 0
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    expected = [slow_divergence(a.tolist(), b.tolist()) for a, b in zip(p, q, strict=True)]
    torch.testing.assert_close(root_divergence(p, q), torch.tensor(expected))
    assert (root_divergence(p, p) < 1e-3).all()
    apart = root_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(apart, torch.tensor(math.log(2)).sqrt())


def codes(tokens: int, dim: int = 128) -> Tensor:
    """Unit vectors, one per token, nearly at right angles to each other."""
    random = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(0))
    return random / random.norm(dim=-1, keepdim=True)


def asked_for(targets: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Queries that attend to the key at their target (its own code), two query heads over one KV head."""
    q = code[targets] * 12 * code.shape[1] ** 0.5
    return q[None, None].expand(1, 2, -1, -1), code[None, None]


@pytest.mark.parametrize("name", ["minference", "flexprefill", "oracle_mass", "oracle"])
@pytest.mark.parametrize("past", [0, 128])
def test_a_planted_vertical_is_found(name: str, past: int) -> None:
    tokens, column = 501, 100
    q, k = asked_for(torch.full((tokens,), column), codes(tokens))
    mask = selected(baselines.create(name, block_size=(32, 32)), q[:, :, past:], k, TWO)
    # One block per row besides the query's own: the one with the column.
    below = range(0, mask.shape[2]) if past else range(4, mask.shape[2])
    for row in below:
        assert mask[0, 0, row, column // 32], row


@pytest.mark.parametrize("name", ["minference", "flexprefill", "oracle_mass", "oracle"])
@pytest.mark.parametrize("past", [0, 64])
def test_a_planted_slash_is_found(name: str, past: int) -> None:
    tokens, back, block = 501, 160, 32
    targets = (torch.arange(tokens) - back).clamp_min(0)
    q, k = asked_for(targets, codes(tokens))
    scorer = baselines.create(name, block_size=(block, block))
    mask = selected(scorer, q[:, :, past:], k, TWO)
    for row in range((back + block - past) // block, mask.shape[2]):
        first = past + row * block - back
        assert mask[0, :, row, first // block].all(), row


@pytest.mark.parametrize("name", ["minference", "flexprefill", "oracle_mass", "oracle"])
def test_a_needle_that_the_end_asks_for_is_found(name: str) -> None:
    tokens, needle = 501, 77
    targets = torch.arange(tokens)
    targets[-20:] = needle
    q, k = asked_for(targets, codes(tokens))
    mask = selected(baselines.create(name, block_size=(32, 32)), q, k, TWO)
    assert mask[0, :, -1, needle // 32].all()


def paired_blocks(tokens: int, block: int) -> tuple[Tensor, Tensor, list[int]]:
    """Blocks of equal keys; all queries of block i attend to one earlier block, another for each."""
    blocks = num_blocks(tokens, block)
    partner = [(5 * i + 2) % (i + 1) if i < blocks - 1 else 1 for i in range(blocks)]
    code = codes(blocks).repeat_interleave(block, 0)[:tokens]
    targets = torch.tensor(partner).repeat_interleave(block)[:tokens] * block
    return *asked_for(targets, code), partner


def test_query_aware_heads_find_what_lines_miss() -> None:
    q, k, partner = paired_blocks(512, 32)
    aware = selected(FlexPrefill((32, 32)), q, k, TWO)
    lines = selected(FlexPrefill((32, 32), tau=0), q, k, TWO)
    assert all(bool(aware[0, :, i, j].all()) for i, j in enumerate(partner))
    assert not all(bool(lines[0, :, i, j].all()) for i, j in enumerate(partner))


def test_each_head_switches_for_itself() -> None:
    q, k, partner = paired_blocks(512, 32)
    # The second head asks for one token of a block, which its mean hides.
    code = codes(513)[1:]
    needle = 70
    k = torch.cat([k, code[None, None]], 1)
    q = torch.cat([q[:, :1], (code[torch.full((512,), needle)] * 12 * 128**0.5)[None, None]], 1)
    mask = selected(FlexPrefill((32, 32)), q, k, TWO)[0]
    assert all(bool(mask[0, i, j]) for i, j in enumerate(partner))
    assert mask[1, 3:, needle // 32].all()
    means = scores_of(baselines.create("meanpool", block_size=(32, 32)), q, k)
    valid = causal_blocks(512, 512, (32, 32))
    actual = scores_of(FlexPrefill((32, 32)), q, k)
    torch.testing.assert_close(actual[:, 0, valid], means[:, 0, valid])
    assert not torch.allclose(actual[:, 1, valid], means[:, 1, valid])


@pytest.mark.parametrize("name", ["minference", "flexprefill", "oracle_mass"])
def test_half_precision_is_scored_in_single(name: str) -> None:
    q, k = (x.to(torch.bfloat16) for x in inputs(70, 120))
    scorer = baselines.create(name, block_size=(16, 16))
    half, single = scores_of(scorer, q, k), scores_of(scorer, q.float(), k.float())
    assert half.dtype == torch.float32
    valid = causal_blocks(70, 120, (16, 16)) & ~Rows.last(70, 120).own((16, 16))
    torch.testing.assert_close(half[..., valid], single[..., valid])


@pytest.mark.parametrize("name", ["minference", "flexprefill"])
def test_no_memory_grows_with_the_square_of_the_length(name: str) -> None:
    """Scores are blocks, and no other tensor holds more than the last queries' map."""
    q, k = torch.randn(1, 2, 4096, 8), torch.randn(1, 1, 4096, 8)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Sizes():
        scores_of(baselines.create(name, block_size=(64, 64)), q, k)
    assert largest <= 2 * 4 * 64 * (4096 + 64)


def test_last_queries_must_be_some() -> None:
    with pytest.raises(ValueError, match="last_queries must be at least 1, got 0"):
        MInference(last_queries=0)
