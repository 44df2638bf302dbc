"""Triton kernels without a GPU: interpreted, each op in a process of its own, and what refuses them."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "op", ["block_sparse_attention", "pooled_attention", "select_blocks", "summarise_blocks"]
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
