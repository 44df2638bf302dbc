"""Triton kernels without a GPU: interpreted, each op in a process of its own, and what refuses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention import triton as backend
from seerattention.ops.block_sparse_attention._options import Options
from seerattention.ops.block_sparse_attention.triton import BLOCKS_K, LAUNCHES, launch_of

pytest.importorskip("triton")

#: Compiles the kernel of `pooled_attention` for Hopper, its launch and what else is asked for given.
COMPILE_POOLED = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from seerattention.ops.pooled_attention import _triton_kernel, triton as backend

dim, per_kv_head, direct = map(int, sys.argv[1:])
launch = backend.launch_of(dim, 4096, 2)
constants = {
    "HEADS": 32, "KV_HEADS": 8, "PER_KV_HEAD": bool(per_kv_head), "D": dim, "BLOCK_D": dim,
    "BLOCK_Q": 1 if per_kv_head else 64, "BLOCK_K": 64, "BLOCK_M": launch.block_m,
    "BLOCK_N": launch.block_n, "CHUNK": 32, "DIRECT": bool(direct), "COPIES": True, "HAS_V": True,
    "SOFTCAP": False, "SINKS": False, "LSE": False, "SEQUENCES": 0, "STAGES": launch.stages,
}
kernel = _triton_kernel.pooled_kernel
tile = f"tensordesc<bf16[1, 1, {launch.block_n}, {dim}]>"
kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
kinds |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
kinds |= dict.fromkeys(("map_ptr", "lse_ptr", "scratch_ptr", "sinks_ptr"), "*fp32")
kinds |= dict.fromkeys(("counter_ptr", "cu_q_ptr", "cu_k_ptr"), "*i32")
kinds |= {"k_desc": tile, "v_desc": tile, "scale": "fp32", "softcap": "fp32"}
source = ASTSource(kernel, kinds, constexprs={(kernel.arg_names.index(n),): c for n, c in constants.items()})
options = {"num_warps": launch.warps, "num_stages": launch.stages}
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
ptx = compiled.asm["ptx"]
print(json.dumps({
    "shared": compiled.metadata.shared,
    "wgmma": ptx.count("wgmma.mma_async"),
    "copies": ptx.count("cp.async.bulk.tensor"),
}))
"""


@pytest.mark.parametrize(("dim", "per_kv_head", "direct"), [(64, 0, 0), (128, 1, 1)])
def test_the_pooled_kernel_compiles_for_hopper(dim: int, per_kv_head: int, direct: int) -> None:
    command = [sys.executable, "-c", COMPILE_POOLED, *map(str, (dim, per_kv_head, direct))]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads(done.stdout)
    # What a program may have on Hopper is 227 KiB.
    assert made["shared"] <= 227 * 1024
    assert made["wgmma"] > 0
    assert made["copies"] > 0


COMPILE_SCORES = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from seerattention.ops.score_blocks import _triton_kernel, triton as backend

name, dtype, dim = sys.argv[1], sys.argv[2], int(sys.argv[3])
kernel = getattr(_triton_kernel, name)
kind = "narrow" if dtype == "bf16" else "wide"
launch = dict(backend.LAUNCH[kind]["score" if name == "score" else "back"])
options = {key: launch.pop(key) for key in ("num_warps", "num_stages")}
constants = launch | {
    "GROUP": 4, "E": dim, "E_PAD": dim, "SUBS_Q": 8, "SUBS_K": 8, "CAUSAL": True,
}
constants |= {"KEEP": True, "PRECISION": "tf32x3"} if name == "score" else {"unit": None, "PRECISION": "ieee"}
names = kernel.arg_names
kinds = dict.fromkeys(names, "i32")
kinds |= {n: "*" + dtype for n in ("queries", "keys", "out") if n in names}
kinds |= {n: "*fp32" for n in ("scores", "gradient") if n in names}
kinds |= {"winners": "*u8", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
# torch's memory begins at multiples of 16 bytes: only then are copies asynchronous.
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kinds[n].startswith("*")}
fixed = {(names.index(n),): value for n, value in constants.items()}
compiled = compile(
    ASTSource(kernel, kinds, constexprs=fixed, attrs=aligned),
    target=GPUTarget("cuda", 90, 32),
    options=options,
)
ptx = compiled.asm["ptx"]
print(json.dumps({"shared": compiled.metadata.shared, "products": ptx.count("wgmma.mma_async")}))
"""


@pytest.mark.parametrize("kernel", ["score", "back_to_queries", "back_to_keys"])
@pytest.mark.parametrize(("dtype", "dim"), [("bf16", 128), ("fp32", 128)])
def test_the_scoring_kernels_compile_for_hopper(kernel: str, dtype: str, dim: int) -> None:
    command = [sys.executable, "-c", COMPILE_SCORES, kernel, dtype, str(dim)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads(done.stdout)
    # GPUs with less shared memory than Hopper have 99 KiB of it.
    assert made["shared"] <= 99 * 1024
    assert (made["products"] > 0) == (dtype == "bf16" or kernel == "score")


@pytest.mark.parametrize(
    "op",
    [
        *("block_sparse_attention", "block_sparse_gradients", "pooled_attention"),
        *("score_blocks", "select_blocks", "summarise_blocks"),
    ],
)
def test_kernels_in_the_interpreter(op: str) -> None:
    # It must be asked for before kernels are defined, and nothing else is to meet it.
    file = Path(__file__).parent / f"interpreted_{op}.py"
    command = [sys.executable, "-m", "pytest", "-q", "--durations=3", str(file)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_cpu_is_refused() -> None:
    q = torch.zeros(1, 1, 64, 64)
    full = BlockSelection.full(64, 64, (64, 64))
    with pytest.raises(NotImplementedError, match="triton: it needs a GPU"):
        block_sparse_attention(q, q, q, full, backend="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton", None)
    full = BlockSelection.full(64, 64, (64, 64))
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
