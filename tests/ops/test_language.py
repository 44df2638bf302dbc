from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seerattention import BlockSelection
from seerattention.ops import language
from seerattention.ops.block_sparse_attention import triton as backend
from seerattention.ops.options import Options
from seerattention.rows import Rows


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "triton", None)
    full = BlockSelection.full(Rows.last(64, 64), (64, 64))
    with FakeTensorMode():
        q = torch.empty(1, 1, 64, 64, device="cuda")
    assert backend.unsupported(q, q, q, full, Options.of(q, q)) == [
        "triton is not installed; `pip install triton` brings it"
    ]


def test_backends_can_be_imported_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from seerattention.ops import block_sparse_attention as op\n"
        "from seerattention.ops import language\n"
        "assert language.triton is None\n"
        "print(op.ORDER)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(backend.__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'triton', 'native', 'gather'" in done.stdout
