"""What can be said of the Hopper kernel of block scores without a GPU: its reasons, and that it compiles."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seerattention.ops.cases.select_blocks import CASES, Case
from seerattention.ops.select_blocks import hopper
from seerattention.ops.select_blocks.kernels.scores import (
    HOPPER_BLOCKS,
    HOPPER_ROUNDING,
    HOPPER_STEPS,
    hopper_tile,
)
from seerattention.policies import TopK, TopP, select
from seerattention.scorer import rounded
from seerattention.testing.selections import Certain, arguments

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from seerattention.ops.select_blocks.kernels import hopper as kernel
from seerattention.ops.select_blocks.kernels.scores import hopper_tile

made = []
for subs, dtype, bits in json.loads(sys.argv[1]):
    types = {"scores": "*i16", "totals": "*fp32", "scale": "fp32"}
    types["queries"] = f"tensordesc<{dtype}[1, 64, 64],{kernel.tiles(bits, 3)!r}>"
    types["keys"] = f"tensordesc<{dtype}[1, 4, 4, 2, 64],{kernel.tiles(bits, 5)!r}>"
    constants = {"SUBS": subs, "BLOCK_Q": 4, "BLOCK_K": 64, "STEPS": 512, **hopper_tile(subs, bits // 8)}
    names = kernel.score.arg_names
    source = GluonASTSource(
        kernel.score,
        {name: types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    made.append([compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async")])
print(json.dumps(made))
"""


#: The default gate's design.
SHARES = {"gate_dim": None, "shares": True}


def test_reasons_on_a_cpu() -> None:
    case = next(c for c in CASES if c.name == "below-block")
    reasons = hopper.unsupported(**arguments(case), policy=TopK(0.1))
    assert "it needs a Hopper GPU" in reasons
    assert "its tensor-core products take bfloat16 and float16, not torch.float32" in reasons
    assert "it takes summaries of 64 numbers, not 16" in reasons
    assert "it needs a Hopper GPU" in hopper.unsupported(**arguments(case, torch.bfloat16), policy=TopK(0.1))


def test_packed_sequences_are_refused() -> None:
    case = next(c for c in CASES if c.lengths)
    assert "it takes no packed sequences" in hopper.unsupported(**arguments(case), policy=TopK(0.1))


def test_the_kernel_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(hopper.__file__).parents[3])
    kinds = [
        (subs, dtype, bits) for dtype, bits in (("bf16", 16), ("fp8e4nv", 8)) for subs in (4, 8, 12, 16, 32)
    ]
    command = [sys.executable, "-c", COMPILE, json.dumps(kinds)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (subs, _, bits), (shared, products) in zip(kinds, json.loads(done.stdout), strict=True):
        # A Hopper multiprocessor lends a program 227 KiB.
        assert shared <= 227 * 1024
        tile = hopper_tile(subs, bits // 8)
        # Per consumer: steps of 32 bytes of numbers for four places of blocks, and a loop of masked ones.
        assert products == tile["CONSUMERS"] * (64 * bits // 256) * (subs // 4 + 1)


def in_steps(scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of shares as the kernels keep them, to the base of 2.

    Args:
        scores: Of query summaries and KV blocks, to the base of 2, ``[rows, whole tiles of blocks]``; -inf
            where a row sees nothing of a block.
        own: The block that each row ends in.
    """
    tiles = (scores * HOPPER_STEPS).round().unflatten(-1, (-1, HOPPER_BLOCKS))
    largest = tiles.amax(-1, keepdim=True).clamp(min=-(2.0**30))
    below = (tiles - largest).clamp(min=-(2.0**14))
    # A total is made of what is kept, and rounded to whole steps below each tile's largest.
    kept = ((below + largest) / HOPPER_STEPS).flatten(-2)
    seen = torch.arange(scores.shape[-1]) <= own[:, None]
    total = (kept.masked_fill(~seen, float("-inf")) * math.log(2)).logsumexp(-1) / math.log(2)
    less = (largest - total[:, None, None] * HOPPER_STEPS).round().clamp(min=-(2.0**14))
    return ((below + less) / HOPPER_STEPS).flatten(-2).masked_fill(~seen, float("-inf"))


@pytest.mark.parametrize("tokens", [511, 4173])
def test_what_is_kept_is_as_near_as_tests_on_a_gpu_ask(tokens: int) -> None:
    """Steps move no block that the bound calls certain, and some that a bound without them does."""
    case = Case(name="", heads=4, kv_heads=2, head_dim=128, queries=tokens, keys=tokens, gate=SHARES)
    with torch.no_grad():
        args = arguments(case, torch.bfloat16)
        gate, rows = args["scorer"], args["rows"]
        queries = gate.summarise_queries(args["q"], positions=rows.positions(args["q"].device))
        queries, keys = (rounded(x, gate)[0].float() for x in (queries, args["k_blocks"]))
        (down, across), (each, subs) = rows.num_blocks(gate.block_size), gate.sub_blocks
        whole = -(-across // HOPPER_BLOCKS) * HOPPER_BLOCKS
        # Summaries of 4 tokens: one sees those that begin by its end.
        row, column = torch.arange(down * each), torch.arange(whole * subs)
        seen = (4 * column[None, :] < 4 * row[:, None] + 4) & (column < keys.shape[1])
        queries = F.pad(queries, (0, 0, 0, down * each - queries.shape[1]))
        keys = F.pad(keys, (0, 0, 0, whole * subs - keys.shape[1])).repeat_interleave(2, 0)
        products = (queries @ keys.mT * (gate.scale * math.log2(math.e))).masked_fill(~seen, float("-inf"))
        best = products.unflatten(-1, (-1, subs)).amax(-1)
        shares = torch.stack([in_steps(x, row * 4 // 64) for x in best])[..., :across]
        # Rows past the last token are none.
        shares[:, -(-tokens // 4) :] = float("-inf")
        shares = shares.unflatten(1, (-1, each)).amax(2)[None] * math.log(2)
        moved = 0
        for policy in (TopK(0.1), TopP(0.9)):
            chosen = select(policy, shares, rows=rows, block_size=gate.block_size)
            certain = Certain.of(policy=policy, **args, rounding=HOPPER_ROUNDING)
            assert certain.share > 0.95
            certain.check(chosen)
            strict, mask = Certain.of(policy=policy, **args), chosen.to_mask()
            moved += int((strict.taken & ~mask).sum() + (strict.left & mask).sum())
        assert (moved > 0) == (tokens > 4000)
