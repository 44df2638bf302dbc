from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from seerattention import (
    AttnGate,
    GateConfig,
    Policy,
    Threshold,
    TopK,
    causal_blocks,
    seer_attention,
    select_blocks,
)
from seerattention.baselines import create
from seerattention.engine.summaries import KeySummaries
from seerattention.gate import Scorer
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing.budget import Budget
from seerattention.testing.conformance import dense_attention
from seerattention.testing.inputs import random_qkv

SHAPE = Shape(name="", heads=4, kv_heads=2, queries=450, keys=450, head_dim=32)
GATE = AttnGate(GateConfig(num_heads=4, num_kv_heads=2, head_dim=32))


def sized(tokens: int) -> Shape:
    return Shape(name="", heads=4, kv_heads=2, queries=tokens, keys=tokens, head_dim=32)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 450])
@pytest.mark.parametrize("scorer", [GATE, create("quest")], ids=["gate", "quest"])
@torch.no_grad()
def test_the_page_is_its_parts(tokens: int, scorer: Scorer) -> None:
    q, k, v = random_qkv(sized(tokens))
    positions = torch.arange(tokens)
    k_blocks = scorer.compress(k, positions=positions)
    out, selection = seer_attention(
        q, k, v, scorer, TopK(0.6), q_scored=q, k_blocks=k_blocks, positions=positions
    )
    mask = selection.to_mask()
    assert mask.any(-1).all()
    assert not (mask & ~causal_blocks(tokens, tokens, (64, 64))).any()
    assert (mask | ~Rows.last(tokens, tokens).own((64, 64))).all()
    Budget.of(lambda q, k, v: block_sparse_attention(q, k, v, selection, backend="reference"), q, k, v).check(
        out
    )


@torch.no_grad()
def test_density_one_is_dense() -> None:
    q, k, v = random_qkv(SHAPE)
    positions = torch.arange(SHAPE.keys)
    k_blocks = GATE.compress(k, positions=positions)
    out, _ = seer_attention(
        q, k, v, GATE, TopK(1.0), q_scored=q, k_blocks=k_blocks, positions=positions, scale=0.3
    )
    Budget.of(lambda q, k, v: dense_attention(q, k, v, scale=0.3), q, k, v).check(out)


@pytest.mark.parametrize("scorer", [GATE, create("quest")], ids=["gate", "quest"])
@torch.no_grad()
def test_packed_sequences_attend_as_alone(scorer: Scorer) -> None:
    rows = Rows.packed([(1, 1), (65, 65), (0, 80), (100, 204), (100, 100)])
    q, k, v = random_qkv(replace(SHAPE, queries=rows.num_queries))
    parts = [
        scorer.compress(k[:, :, one], positions=torch.arange(tokens))
        for one, (_, tokens) in zip(rows.places(rows.num_keys), rows.known, strict=True)
    ]
    longest = max(part.shape[2] for part in parts)
    k_blocks = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])
    asked = {"k_blocks": k_blocks, "rows": rows, "backend": "reference"}
    out, selection = seer_attention(q, k, v, scorer, TopK(0.4), q_scored=q, **asked)
    for one, (down, across) in rows.maps((64, 64)):
        own = (q[:, :, one.queries], *(x[:, :, one.keys] for x in (k, v)))
        alone, chosen = seer_attention(
            *own, scorer, TopK(0.4), q_scored=own[0], k_blocks=parts[one.index], rows=one.rows
        )
        assert torch.equal(selection.to_mask()[:, :, down, across], chosen.to_mask())
        budget = Budget.of(partial(block_sparse_attention, selection=chosen, backend="reference"), *own)
        budget.check(out[:, :, one.queries])
        budget.check(alone)


@pytest.mark.parametrize("pieces", [(128, 322), (64, 64, 64, 258), (448, 2), (384, 66)])
@pytest.mark.parametrize("policy", [Threshold(0.15), Threshold(0.3, sink_blocks=1, local_blocks=2)], ids=str)
@torch.no_grad()
def test_prompt_in_pieces_selects_as_at_once(pieces: tuple[int, ...], policy: Policy) -> None:
    q, k, _ = random_qkv(SHAPE)
    positions = torch.arange(SHAPE.keys)
    k_blocks = GATE.compress(k, positions=positions)
    whole = select_blocks(q, k_blocks, GATE, policy, positions=positions).to_mask()
    assert 0.2 < whole.float().mean() < 0.5
    summaries = KeySummaries(GATE)
    end = 0
    for piece in pieces:
        start, end = end, end + piece
        assert summaries.keep(k[:, :, :start]) == start
        summaries.extend(k[:, :, start:end], k[:, :, start:end])
        part = select_blocks(
            q[:, :, start:end],
            summaries.all(),
            GATE,
            policy,
            positions=positions[start:end],
            rows=Rows.last(piece, end),
        ).to_mask()
        rows = slice(start // 64, start // 64 + part.shape[2])
        # A block that the piece leaves unfinished gets a new summary later, so its row may differ.
        whole_rows = part.shape[2] if end % 64 == 0 or end == SHAPE.keys else part.shape[2] - 1
        expected = whole[:, :, rows, : part.shape[3]]
        assert torch.equal(part[:, :, :whole_rows], expected[:, :, :whole_rows])
    assert end == SHAPE.keys
