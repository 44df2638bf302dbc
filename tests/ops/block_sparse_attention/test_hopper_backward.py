"""What can be said of Hopper's gradients without a GPU: who makes them, and that their kernel compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention import BlockSelection
from seerattention.ops.block_sparse_attention import hopper
from seerattention.ops.block_sparse_attention.kernels import backward, hopper_backward
from seerattention.ops.options import Options
from seerattention.rows import Rows

#: Head dimension, query heads to a KV head and to a row of bits, and block sizes.
KINDS = [(128, 4, 1, 64, 64), (64, 4, 1, 64, 64), (128, 1, 8, 128, 128)]

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from seerattention.ops.block_sparse_attention.kernels import hopper, hopper_columns as kernel
from seerattention.ops.block_sparse_attention.kernels.hopper_backward import STAGES

made = []
for dim, group, shared, block_q, block_k in json.loads(sys.argv[1]):
    tile = f"tensordesc<bf16[1, 1, 64, {dim}],{hopper.TILES!r}>"
    line = f"tensordesc<fp32[64],{kernel.LINE!r}>"
    kinds = {"dk": "*bf16", "dv": "*bf16", "partial": "*fp32", "bits": "*i32", "counter": "*i32"}
    # Strides of more than 31 bits take the most room.
    kinds |= {"plan": "*i32", "scale": "fp32", "stride_dk_b": "i64", "stride_dk_h": "i64"}
    kinds |= dict.fromkeys(("qd", "gd", "kd", "vd"), tile) | dict.fromkeys(("shift_desc", "delta_desc"), line)
    constants = {
        "D": dim, "GROUP": group, "SHARED": shared, "BLOCK_Q": block_q, "PARTS": block_k // 64,
        "STAGES": STAGES[dim],
    }
    names = kernel.attend_back.arg_names
    source = GluonASTSource(
        kernel.attend_back,
        {name: kinds.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    made.append([compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async")])
print(json.dumps(made))
"""


def given(**changes: Tensor) -> dict[str, Any]:
    """Return a call of the backward; what it computes from is not looked at."""
    x = torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16)
    call = dict.fromkeys(("grad", "q", "k", "v", "out"), x) | changes
    lse = torch.zeros(1, 2, 128)
    rows = Rows.last(128, 128)
    return {
        **call, "grad_lse": lse, "lse": lse, "selection": BlockSelection.full(rows, (64, 64)),
        "options": Options(rows=rows, scale=1.0),
    }  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what the shared backward is asked for."""
    calls: list[dict[str, Any]] = []
    names = ("grad", "grad_lse", "q", "k", "v", "out", "lse", "selection", "options")

    def backward_anywhere(*call: Any, columns: Any = None) -> None:
        calls.append(dict(zip(names, call, strict=True)) | {"columns": columns})

    monkeypatch.setattr(backward, "backward", backward_anywhere)
    monkeypatch.setattr(hopper_backward, "kernel", object())
    return calls


def odd(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 3))[..., : x.shape[3]]


def test_keys_and_values_have_a_kernel(asked: list[dict[str, Any]]) -> None:
    call = given()
    hopper.backward(**call)
    assert asked[0]["columns"] is hopper_backward.keys
    assert all(asked[0][name] is x for name, x in call.items())


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tensors_that_tma_cannot_copy_go_to_triton(name: str, asked: list[dict[str, Any]]) -> None:
    hopper.backward(**given(**{name: odd(given()[name])}))
    assert asked[0]["columns"] is None


def test_without_gluon_all_go_to_triton(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_backward, "kernel", None)
    hopper.backward(**given())
    assert asked[0]["columns"] is None


@pytest.mark.parametrize("how", ["strides", "address", "one number"])
def test_a_gradient_that_tma_cannot_copy_is_copied(how: str, asked: list[dict[str, Any]]) -> None:
    grad = torch.randn(1, 2, 128, 64).to(torch.bfloat16)
    other = {
        "strides": odd(grad),
        "address": torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape),
        "one number": grad[..., :1].expand(grad.shape),
    }[how]
    hopper.backward(**given(grad=other))
    assert asked[0]["columns"] is hopper_backward.keys
    assert asked[0]["grad"].is_contiguous()
    assert asked[0]["grad"].data_ptr() % 16 == 0
    assert torch.equal(asked[0]["grad"], other)


def test_bits_are_read_word_by_word(asked: list[dict[str, Any]]) -> None:
    call = given()
    bits = call["selection"].bits
    call["selection"] = BlockSelection(torch.stack([bits, bits], -1)[..., 0], (1, 1, 2, 2), (64, 64))
    hopper.backward(**call)
    assert asked[0]["selection"].bits.is_contiguous()
    assert torch.equal(asked[0]["selection"].bits, bits)


def test_the_kernel_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(hopper.__file__).parents[3])
    command = [sys.executable, "-c", COMPILE, json.dumps(KINDS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (dim, *_), (shared, products) in zip(KINDS, json.loads(done.stdout), strict=True):
        # A Hopper multiprocessor lends a program 227 KiB; another version of Triton may want more of them.
        assert shared <= 227 * 1024 - 500
        # Per consumer: scores and their gradients over the head dimension, then dv and dk over 64 queries.
        assert products == 2 * (2 * dim // 16 + 2 * 64 // 16)
