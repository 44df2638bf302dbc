"""What can be said of the Hopper kernel of block scores without a GPU: its reasons, and that it compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seerattention.ops.cases.select_blocks import CASES
from seerattention.ops.select_blocks import hopper
from seerattention.ops.select_blocks.kernels.scores import hopper_tile
from seerattention.policies import TopK
from seerattention.testing.selections import arguments

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
