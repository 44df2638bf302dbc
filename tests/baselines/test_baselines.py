from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention import TopK, baselines, causal_blocks, select_blocks
from seerattention.baselines.xattention import XAttention
from seerattention.gate import Scorer
from seerattention.ops import attention_scores
from seerattention.ops.options import PoolOptions
from seerattention.ops.shapes import Shape
from seerattention.rows import num_blocks
from seerattention.testing.conformance import slow_pooled_map
from seerattention.testing.inputs import random_qkv

HEADS, KV_HEADS, DIM = 4, 2, 16


def inputs(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    q, k, _ = random_qkv(
        Shape(name="", heads=HEADS, kv_heads=KV_HEADS, queries=queries, keys=keys, head_dim=DIM, batch=2)
    )
    return q, k


def scores_of(scorer: Scorer, q: Tensor, k: Tensor) -> Tensor:
    tokens = k.shape[2]
    k_blocks = scorer.compress(k, positions=torch.arange(tokens))
    valid = causal_blocks(q.shape[2], tokens, scorer.block_size)
    return scorer.score(q, k_blocks, positions=torch.arange(tokens - q.shape[2], tokens), valid=valid)


def per_block(
    formula: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, block_size: tuple[int, int]
) -> Tensor:
    """Apply a formula of ``[rows, D]`` queries and ``[columns, D]`` keys to every block pair."""
    (block_q, block_k), groups = block_size, HEADS // KV_HEADS
    nq, nk = num_blocks(q.shape[2], block_q), num_blocks(k.shape[2], block_k)
    out = torch.zeros(q.shape[0], HEADS, nq, nk)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for i, rows in enumerate(q[b, h].split(block_q)):
                for j, columns in enumerate(k[b, h // groups].split(block_k)):
                    out[b, h, i, j] = formula(rows, columns)
    return out


def meanpool(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.mean(0) @ columns.mean(0) / math.sqrt(DIM)


def quest(rows: Tensor, columns: Tensor) -> Tensor:
    low, high = columns.min(0).values, columns.max(0).values
    return torch.stack([torch.maximum(q * low, q * high).sum() for q in rows]).max() / math.sqrt(DIM)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 63), (65, 65), (200, 200), (72, 200), (1, 200)])
@pytest.mark.parametrize("block_size", [(64, 64), (32, 64), (64, 16)])
@pytest.mark.parametrize("formula", [meanpool, quest])
def test_block_formulas(
    formula: Callable[[Tensor, Tensor], Tensor], block_size: tuple[int, int], queries: int, keys: int
) -> None:
    q, k = inputs(queries, keys)
    actual = scores_of(baselines.create(formula.__name__, block_size=block_size), q, k)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, per_block(formula, q, k, block_size))


def slow_xattention(q: Tensor, k: Tensor, block_size: tuple[int, int], stride: int) -> Tensor:
    """Log of each block's summed share, one group of tokens at a time."""
    groups = HEADS // KV_HEADS
    (block_q, block_k), past = block_size, (k.shape[2] - q.shape[2]) // stride
    nq, nk = num_blocks(q.shape[2], block_q), num_blocks(k.shape[2], block_k)
    out = torch.zeros(q.shape[0], HEADS, nq, nk)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for a in range(num_blocks(q.shape[2], stride)):
                row = []
                for c in range(past + a + 1):
                    # The antidiagonal of the square where query group a meets key group c.
                    total = 0.0
                    for i in range(stride):
                        at_q, at_k = a * stride + stride - 1 - i, c * stride + i
                        if at_q < q.shape[2] and at_k < k.shape[2]:
                            total += float(q[b, h, at_q] @ k[b, h // groups, at_k])
                    row.append(total / math.sqrt(DIM) / stride)
                share = torch.tensor(row).softmax(0)
                for c, weight in enumerate(share):
                    out[b, h, a * stride // block_q, c * stride // block_k] += weight
    return out.log()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 63), (65, 65), (128, 128), (75, 139)])
@pytest.mark.parametrize("block_size", [(64, 64), (64, 32), (32, 64)])
def test_xattention(block_size: tuple[int, int], queries: int, keys: int) -> None:
    q, k = inputs(queries, keys)
    actual = scores_of(baselines.create("xattention", block_size=block_size), q, k)
    expected = slow_xattention(q, k, block_size, 8)
    valid = causal_blocks(queries, keys, block_size)
    torch.testing.assert_close(actual[..., valid], expected[..., valid])
    assert (actual[..., ~valid] == -torch.inf).all()


def test_xattention_stride() -> None:
    q, k = inputs(96, 96)
    actual = scores_of(XAttention((32, 32), stride=16), q, k)
    torch.testing.assert_close(actual, slow_xattention(q, k, (32, 32), 16))
    with pytest.raises(ValueError, match=r"stride=24 must divide the block sizes \(64, 64\)"):
        XAttention(stride=24)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (65, 65), (200, 200), (72, 200)])
@pytest.mark.parametrize("block_size", [(64, 64), (32, 64)])
def test_oracle(block_size: tuple[int, int], queries: int, keys: int) -> None:
    q, k = inputs(queries, keys)
    actual = scores_of(baselines.create("oracle", block_size=block_size), q, k)
    expected = slow_pooled_map(q, k, block_size, PoolOptions.of(q, k))
    torch.testing.assert_close(actual, expected.log())


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (65, 65), (100, 100), (37, 139)])
@pytest.mark.parametrize("block_size", [(32, 32), (16, 32), (32, 16)])
def test_oracle_mass(
    block_size: tuple[int, int], queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = inputs(queries, keys)
    expected = torch.zeros(
        q.shape[0], HEADS, num_blocks(queries, block_size[0]), num_blocks(keys, block_size[1])
    )
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for r in range(queries):
                logits = [float(q[b, h, r] @ key) / math.sqrt(DIM) for key in k[b, h // (HEADS // KV_HEADS)]]
                weights = [math.exp(x) for x in logits[: keys - queries + r + 1]]
                for c, weight in enumerate(weights):
                    expected[b, h, r // block_size[0], c // block_size[1]] += weight / sum(weights)
    scorer = baselines.create("oracle_mass", block_size=block_size)
    for work in (attention_scores.WORK_BYTES["cpu"], 1, 4 * 2 * keys * block_size[0] * 2):
        # One slice, one query block at a time, two at a time.
        monkeypatch.setitem(attention_scores.WORK_BYTES, "cpu", work)
        torch.testing.assert_close(scores_of(scorer, q, k), expected.log())


def test_streaming_takes_the_first_and_the_latest_blocks() -> None:
    q, k = inputs(640, 640)
    scorer = baselines.create("streaming", block_size=(64, 64))
    k_blocks = scorer.compress(k, positions=torch.arange(640))
    selection = select_blocks(q, k_blocks, scorer, TopK(0.52))
    assert TopK(0.52).blocks(10) == 3
    for row, mask in enumerate(selection.to_mask()[0, 0]):
        assert mask.nonzero()[:, 0].tolist() == sorted({0, max(0, row - 1), row})


def test_random_is_alike_for_one_seed() -> None:
    q, k = inputs(300, 300)
    first, again, other = (scores_of(baselines.create("random", seed=seed), q, k) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0, 0], first[0, 1])
    assert first.min() >= 0
    assert first.max() < 1


@pytest.mark.parametrize("name", baselines.names())
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_every_baseline_is_a_scorer(name: str, tokens: int) -> None:
    scorer = baselines.create(name, block_size=(64, 64))
    assert scorer.block_size == (64, 64)
    assert scorer.after_rope
    q, k = inputs(tokens, tokens)
    k_blocks = scorer.compress(k, positions=torch.arange(tokens))
    selection = select_blocks(q, k_blocks, scorer, TopK(0.2))
    mask = selection.to_mask()
    assert mask.diagonal(dim1=2, dim2=3).all()
    assert not mask.triu(1).any()


@pytest.mark.parametrize("name", baselines.names())
def test_summaries_in_pieces_are_summaries_at_once(name: str) -> None:
    _, k = inputs(200, 200)
    scorer = baselines.create(name, block_size=(64, 64))
    whole = scorer.compress(k, positions=torch.arange(200))
    pieces = [
        scorer.compress(k[:, :, start : start + 64], positions=torch.arange(start, min(start + 64, 200)))
        for start in range(0, 200, 64)
    ]
    assert torch.equal(torch.cat(pieces, 2), whole)


def test_found_by_name() -> None:
    expected = "flexprefill meanpool minference oracle oracle_mass quest random streaming xattention"
    assert baselines.names() == expected.split()
    with pytest.raises(ValueError, match=r"unknown baseline 'magic'; there are .*meanpool, .*xattention"):
        baselines.create("magic")
    with pytest.raises(ValueError, match="unknown baseline '__init__'"):
        baselines.create("__init__")


@pytest.mark.parametrize("name", baselines.names())
@pytest.mark.parametrize("block_size", [64, (64,), (0, 64), (64, -8), (64.0, 64.0), (True, 64), "64", None])
def test_blocks_of_no_size_are_refused_before_any_work(name: str, block_size: Any) -> None:
    with pytest.raises(ValueError, match="block_size must be"):
        baselines.create(name, block_size=block_size)


def test_a_new_baseline_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(baselines.__file__).with_name("meanpool.py").read_text(encoding="utf-8")
    (tmp_path / "added.py").write_text(source.replace("MeanPool", "Added"), encoding="utf-8")
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    assert "added" in baselines.names()
    q, k = inputs(200, 200)
    scorer = baselines.create("added", block_size=(32, 32))
    assert type(scorer).__name__ == "Added"
    assert torch.equal(
        scores_of(scorer, q, k), scores_of(baselines.create("meanpool", block_size=(32, 32)), q, k)
    )
