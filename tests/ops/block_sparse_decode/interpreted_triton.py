"""The Triton kernels interpreted; `tests/ops/test_triton.py` runs this file in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seerattention.ops.block_sparse_decode import block_sparse_decode
from seerattention.ops.block_sparse_decode import triton as backend
from seerattention.ops.cases.block_sparse_decode import CASES, Case
from seerattention.testing.decoding import check_decode, decode_inputs

# A query that sees nothing has a denominator of 0, whose logarithm the kernels take on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

SMALL = [case for case in CASES if not case.large]


BY_NAME = {case.name: case for case in SMALL}


def split(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    monkeypatch.setattr(backend, "splits_of", lambda items, blocks, programs: splits)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_check(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    split(monkeypatch, 4)
    check_decode(backend, case)


@pytest.mark.parametrize("name", ["unfinished-block", "empty", "softcap-and-sinks", "paged"])
def test_in_one_part(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    split(monkeypatch, 1)
    check_decode(backend, BY_NAME[name])


@pytest.mark.parametrize("splits", [1, 4])
def test_half_precision(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    split(monkeypatch, splits)
    check_decode(backend, BY_NAME["drafted"], torch.float16)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    split(monkeypatch, 4)
    q, k, v, selection, options = decode_inputs(BY_NAME["drafted"])
    out, _ = backend.run(q, k, v, selection, replace(options, scale=scale))
    expected = block_sparse_decode(q, k, v, selection, scale=scale, backend="reference")
    torch.testing.assert_close(out, expected)


def test_splits_follow_from_shapes() -> None:
    assert [backend.splits_of(items, 512, 264) for items in (1, 8, 64, 200)] == [64, 64, 8, 1]
    assert backend.splits_of(1, 3, 264) == 4
