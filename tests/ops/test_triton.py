"""Triton kernels without a GPU: interpreted, each op in a process of its own, and what refuses them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention import triton as backend
from seerattention.ops.block_sparse_attention._options import Options
from seerattention.ops.block_sparse_attention.triton import BLOCKS_K, LAUNCHES, launch_of
from seerattention.ops.pooled_attention import triton as pooled
from seerattention.ops.score_blocks import _triton_kernel
from seerattention.ops.score_blocks import triton as scoring
from seerattention.rows import Rows

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
compiles = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted here")
# Said once per process: how products and sums are fused by default will change in Triton 3.10.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")


def typed(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """Arguments of `ASTSource`: everything that is no constant and has no type is a whole number."""
    names = kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | types | dict.fromkeys(constants, "constexpr")
    fixed = {(names.index(name),): value for name, value in constants.items()}
    return {"signature": {name: kinds[name] for name in names}, "constexprs": fixed}


@compiles
@pytest.mark.parametrize(("dim", "per_kv_head", "direct"), [(64, False, False), (128, True, True)])
def test_the_pooled_kernel_compiles_for_hopper(dim: int, per_kv_head: bool, direct: bool) -> None:
    launch = pooled.launch_of(dim, 4096, 2)
    constants = {
        "HEADS": 32, "KV_HEADS": 8, "PER_KV_HEAD": per_kv_head, "D": dim, "BLOCK_D": dim,
        "BLOCK_Q": 1 if per_kv_head else 64, "BLOCK_K": 64, "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n, "CHUNK": 32, "DIRECT": direct, "COPIES": True, "HAS_V": True,
        "SOFTCAP": False, "SINKS": False, "LSE": False, "SEQUENCES": 0, "STAGES": launch.stages,
    }  # fmt: skip
    tile = f"tensordesc<bf16[1, 1, {launch.block_n}, {dim}]>"
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("map_ptr", "lse_ptr", "scratch_ptr", "sinks_ptr"), "*fp32")
    types |= dict.fromkeys(("counter_ptr", "cu_q_ptr", "cu_k_ptr"), "*i32")
    types |= {"k_desc": tile, "v_desc": tile, "scale": "fp32", "softcap": "fp32"}
    source = ASTSource(pooled.pooled_kernel, **typed(pooled.pooled_kernel, constants, types))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=HOPPER, options=options)
    # What a program may have on Hopper is 227 KiB.
    assert made.metadata.shared <= 227 * 1024
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert "cp.async.bulk.tensor" in made.asm["ptx"]


@compiles
@pytest.mark.parametrize("name", ["score", "back_to_queries", "back_to_keys"])
@pytest.mark.parametrize(("dtype", "dim"), [("bf16", 128), ("fp32", 128)])
def test_the_scoring_kernels_compile_for_hopper(name: str, dtype: str, dim: int) -> None:
    kernel = getattr(_triton_kernel, name)
    kind = "narrow" if dtype == "bf16" else "wide"
    constants = dict(scoring.LAUNCH[kind]["score" if name == "score" else "back"])
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    constants |= {"GROUP": 4, "E": dim, "E_PAD": dim, "SUBS_Q": 8, "SUBS_K": 8, "CAUSAL": True}
    constants |= {"KEEP": True, "PRECISION": "tf32x3"} if name == "score" else {"unit": None}
    names = kernel.arg_names
    types = {n: "*" + dtype for n in ("queries", "keys", "out") if n in names}
    types |= {n: "*fp32" for n in ("scores", "gradient") if n in names}
    types |= {n: t for n, t in (("winners", "*u8"), ("scale", "fp32")) if n in names}
    # torch's memory begins at multiples of 16 bytes: only then are copies asynchronous.
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.startswith("*")}
    source = ASTSource(kernel, **typed(kernel, constants, types), attrs=aligned)
    made = triton.compile(source, target=HOPPER, options=options)
    # GPUs with less shared memory than Hopper have 99 KiB of it.
    assert made.metadata.shared <= 99 * 1024
    assert ("wgmma.mma_async" in made.asm["ptx"]) == (dtype == "bf16" or name == "score")


@pytest.mark.parametrize(
    "ops",
    [
        ("block_sparse_attention", "summarise_blocks"),
        ("block_sparse_gradients", "select_blocks"),
        ("pooled_attention", "score_blocks"),
    ],
    ids=" ".join,
)
def test_kernels_in_the_interpreter(ops: tuple[str, ...]) -> None:
    # It must be asked for before kernels are defined, and nothing else is to meet it.
    files = [str(Path(__file__).parent / f"interpreted_{op}.py") for op in ops]
    command = [sys.executable, "-m", "pytest", "-q", "--durations=3", *files]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_cpu_is_refused() -> None:
    q = torch.zeros(1, 1, 64, 64)
    full = BlockSelection.full(Rows.last(64, 64), (64, 64))
    with pytest.raises(NotImplementedError, match="triton: it needs a GPU"):
        block_sparse_attention(q, q, q, full, backend="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton", None)
    full = BlockSelection.full(Rows.last(64, 64), (64, 64))
    with FakeTensorMode():
        q = torch.empty(1, 1, 64, 64, device="cuda")
    assert backend.unsupported(q, q, q, full, Options(scale=1.0)) == [
        "triton is not installed; `pip install triton` brings it"
    ]


def test_the_file_can_be_imported_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from seerattention.ops import block_sparse_attention as op\n"
        "assert op.triton.triton is None\n"
        "print(op.ORDER)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(backend.__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'triton', 'gather'" in done.stdout


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_q", [1, 16, 32, 48, 64, 128, 256])
def test_launches_fit_the_blocks(head_dim: int, block_q: int) -> None:
    for itemsize in (2, 4):
        for block_k in BLOCKS_K:
            launch = launch_of(head_dim, (block_q, block_k), itemsize)
            assert block_k % launch.block_n == 0
            assert 16 <= launch.block_m <= max(16, 2 * block_q)
            assert launch.block_m & (launch.block_m - 1) == 0
    assert all(a.block_m < b.block_m for a, b in (x for x in LAUNCHES.values() if len(x) == 2))
