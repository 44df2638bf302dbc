"""What can be said of the Hopper kernel of summaries without a GPU: its reasons, and that it compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seerattention.ops.options import SummaryOptions
from seerattention.ops.summarise_blocks import hopper
from seerattention.rows import Rows

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from seerattention.ops.summarise_blocks.kernels import hopper as kernel
from seerattention.ops.summarise_blocks.hopper import stages

made = []
for kind, size, width, dim, pools, rotates, out in json.loads(sys.argv[1]):
    matrix = kernel.gl.NVMMASharedLayout(min(128, 2 * dim), 16, 2)
    types = {"x": f"*{kind}", "out": f"*{out}"}
    types["parts"] = f"tensordesc<{kind}[1, 1, {min(size, 4)}, 64, 64],{kernel.TOKENS!r}>"
    types["matrices"] = f"tensordesc<{kind}[64, {dim}],{matrix!r}>"
    held = sum(place >= 0 for place in pools) * width * dim * 2
    constants = {"SIZE": size, "D": width, "POOLS": tuple(pools), "STAGES": stages(size, held, dim)}
    if rotates:
        types |= {"cos": "*fp32", "sin": "*fp32"}
    else:
        constants |= {"cos": None, "sin": None}
    names = kernel.summarise.arg_names
    source = GluonASTSource(
        kernel.summarise,
        {name: types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    made.append([compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async")])
print(json.dumps(made))
"""


def asked(x: torch.Tensor, **options: Any) -> SummaryOptions:
    given: dict[str, Any] = {
        "size": 4, "pools": ("max", "min", "avg"), "dtype": x.dtype,
        "weight": x.new_empty(x.shape[1], 3 * x.shape[3], 64),
    }  # fmt: skip
    return SummaryOptions(**given | options)


def tokens(count: int = 1 << 16, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(1, count, 8, width, dtype=dtype).transpose(1, 2)


def test_only_the_device_is_missing() -> None:
    reasons = hopper.unsupported(tokens(), asked(tokens()))
    assert [reason for reason in reasons if "GPU" not in reason] == []
    assert "it needs a Hopper GPU" in reasons


@pytest.mark.parametrize(
    ("x", "options", "reason"),
    [
        (tokens(dtype=torch.float32), {}, "products take bfloat16 and float16, not torch.float32"),
        (tokens(dtype=torch.float16), {"dtype": torch.bfloat16}, "in the tokens' dtype, torch.float16"),
        (tokens(width=96), {}, "it takes heads of (64, 128) numbers, not 96"),
        (tokens(), {"size": 6}, "it takes blocks of (2, 4, 8, 16) tokens, not 6"),
        (tokens((1 << 15) - 1), {}, "of fewer than 262,144 tokens of all heads it is no faster than triton"),
        (tokens(width=256)[..., ::2], {}, "x must be 16-byte aligned with a contiguous last dimension"),
        (tokens()[..., :1, :].expand(1, 8, 1 << 16, 128), {}, "x must be 16-byte aligned"),
        (tokens(), {"weight": None}, "it does nothing without a projection"),
        (tokens(), {"weight": tokens().new_empty(16, 384, 64)}, "it projects a head once"),
        (tokens(), {"weight": tokens().new_empty(8, 384, 48)}, "summaries of (16, 32, 64, 128) numbers"),
        (tokens(), {"weight": tokens().new_empty(8, 384, 128), "size": 16}, "no room for blocks of 16"),
        (tokens(), {"norm": tokens().new_empty(64)}, "it does not normalise"),
        (tokens(), {"rows": Rows.packed([(1 << 15, 1 << 15)] * 2)}, "it takes no packed sequences"),
        (tokens(), {"merge": 2}, "it does not merge heads"),
        (tokens(), {"rounded_to": torch.float8_e5m2}, "it rounds to float8_e4m3fn, not to torch.float8_e5m2"),
    ],
)  # fmt: skip
def test_reasons_why_not(x: torch.Tensor, options: dict[str, Any], reason: str) -> None:
    assert any(reason in why for why in hopper.unsupported(x, asked(x, **options)))


def test_the_kernel_compiles_for_hopper() -> None:
    pytest.importorskip("triton.experimental.gluon")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(hopper.__file__).parents[3])
    kinds = [
        ("bf16", 4, 128, 64, (0, 1, 2), True, "bf16"),
        ("bf16", 4, 128, 64, (0, 1, 2), True, "fp8e4nv"),
        ("fp16", 4, 64, 64, (0, 1, 2), False, "fp16"),
        ("bf16", 16, 128, 64, (-1, -1, 0), True, "bf16"),
        ("bf16", 2, 128, 128, (1, 2, 0), True, "bf16"),
        ("bf16", 8, 128, 16, (0, -1, 1), True, "bf16"),
    ]
    command = [sys.executable, "-c", COMPILE, json.dumps(kinds)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, _, width, _, pools, _, _), (shared, products) in zip(kinds, json.loads(done.stdout), strict=True):
        # A Hopper multiprocessor lends a program 227 KiB; other versions of Triton may take a little more.
        assert shared <= 227 * 1024 - 500
        # Per consumer: steps of 16 numbers of all pools.
        assert products == 2 * sum(place >= 0 for place in pools) * width // 16
