"""What every backend of `summarise_blocks` and `update_summaries` must do."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seerattention.gate import AttnGate, GateConfig
from seerattention.ops.cases.select_decode_blocks import Case
from seerattention.ops.cases.summarise_blocks import Case as SummaryCase
from seerattention.ops.summarise_blocks import summarise_blocks
from seerattention.testing.budget import Budget
from seerattention.testing.conformance import Backend
from seerattention.testing.inputs import random_qkv


def inputs(case: SummaryCase, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """Return what `summarise_blocks` is called with, but for size and pools."""
    width = len(case.pools) * case.width
    weight = torch.randn(case.heads_out, width, case.dim) / width**0.5 if case.heads_out else None
    angle = torch.rand(case.batch, case.blocks, case.dim) * 6
    given: dict[str, Any] = {
        # Heads after tokens in memory, as a model's own projections leave them.
        "x": torch.randn(case.batch, case.tokens, case.heads, case.width).transpose(1, 2),
        "weight": weight,
        "norm": torch.rand(case.dim) + 0.5 if case.norm else None,
    }
    given = {n: None if t is None else t.to(device, dtype) for n, t in given.items()}
    turns = (angle.cos().to(device), angle.sin().to(device)) if case.rope else None
    return given | {"rotary": turns, "rows": case.rows}


def budget(case: SummaryCase, given: dict[str, Any]) -> Budget:
    """Return how far summaries may be from the reference's in fp64."""
    names = [n for n in ("x", "weight", "norm") if given[n] is not None]

    def reference(*tensors: Tensor) -> Tensor:
        called: dict[str, Any] = given | dict(zip(names, tensors, strict=True))
        return summarise_blocks(called.pop("x"), case.size, case.pools, **called, backend="reference")

    return Budget.of(reference, *(given[n] for n in names))


@torch.no_grad()
def check_updates(
    backend: Backend, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> None:
    """Let sequences grow by steps and compare with the summaries of all their keys at once.

    Sequences begin at a block's first, second and last place, and grow by two blocks at least. What no step
    may read or write holds NaN.

    Raises:
        AssertionError: If a summary is wrong, late or where none belongs, or the tail is not the keys'.
    """
    block, new = case.block_size[1], case.queries
    begins = [0, 1, block - 1, 2 * block]
    steps = 2 * block // new + 1
    drawn = replace(case, batch=len(begins), keys=4 * block + 2 * new)
    _, k, _ = random_qkv(drawn, dtype=dtype, device=device)
    # As a projection hands them over: heads after tokens in memory.
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    torch.manual_seed(1)
    gate = AttnGate(GateConfig(**case.design)).to(device, dtype)
    subs, heads = gate.sub_blocks[1], len(gate.linear_k())
    summaries = torch.full(
        (len(begins), heads, 6 * subs, gate.config.dim), torch.nan, device=device, dtype=dtype
    )
    tail = torch.full((*k.shape[:2], block, k.shape[3]), torch.nan, device=device, dtype=dtype)

    def all_at_once(k: Tensor) -> Tensor:
        whole = k[:, :, : k.shape[2] // block * block]
        twin = copy.deepcopy(gate).to(k.dtype)
        return twin.compress(whole, positions=torch.arange(whole.shape[2], device=device))

    for row, begin in enumerate(begins):
        done = begin // block * block
        if done:
            summaries[row, :, : done // block * subs] = all_at_once(k[row : row + 1, :, :done])[0]
        tail[row, :, : begin - done] = k[row, :, done:begin]
    lengths = torch.tensor(begins, dtype=torch.int32, device=device)
    for step in range(steps):
        places = [range(begin + step * new, begin + (step + 1) * new) for begin in begins]
        added = torch.stack([k[row, :, list(at)] for row, at in enumerate(places)])
        lengths += new
        backend.run(summaries, tail, added, gate.per_token(), lengths)
        for row, at in enumerate(places):
            held = at.stop // block
            assert not summaries[row, :, : held * subs].isnan().any(), "a finished block has no summary"
            assert summaries[row, :, held * subs :].isnan().all(), "a summary of no finished block"
            assert torch.equal(tail[row, :, : at.stop % block], k[row, :, held * block : at.stop])
    for row, begin in enumerate(begins):
        length = begin + steps * new
        budget = Budget.of(all_at_once, k[row : row + 1, :, :length])
        budget.check(summaries[row : row + 1, :, : length // block * subs])
