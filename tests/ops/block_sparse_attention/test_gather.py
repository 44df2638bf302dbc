from __future__ import annotations

import pytest
import torch

from seerattention import block_sparse_attention
from seerattention.ops.block_sparse_attention import gather, reference
from seerattention.ops.cases.block_sparse_attention import CASES
from seerattention.ops.options import Options
from seerattention.ops.shapes import Shape
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.memory import LargestTensor

SMALL = [case for case in CASES if not case.large]


def test_rows_do_not_see_nan_that_only_others_read() -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=500, keys=500, head_dim=64)
    q, k, v = random_qkv(shape)
    selection = random_selection(shape, density=0.3)
    clean, _ = gather.run(q, k, v, selection, Options.of(q, k))
    k[:, :, 128:192], v[:, :, 128:192] = torch.nan, torch.nan
    poisoned, _ = gather.run(q, k, v, selection, Options.of(q, k))
    reads = selection.to_mask()[..., 2].repeat_interleave(64, -1)[..., :500]
    assert torch.equal(poisoned[~reads], clean[~reads])
    assert poisoned[reads].isnan().all()


@pytest.mark.parametrize("size", [1, 50_000, 1_000_000])
def test_in_smaller_parts(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(gather, "WORK_BYTES", size)
    for case in SMALL:
        conformance.attention_matches_reference(gather, case)


@pytest.mark.parametrize("block_size", [(64, 64), (16, 16)])
def test_needs_no_dense_map(block_size: tuple[int, int]) -> None:
    shape = Shape(name="", heads=2, kv_heads=1, queries=4096, keys=4096, head_dim=64, block_size=block_size)
    q, k, v = random_qkv(shape)
    selection = random_selection(shape, density=0.1)
    with LargestTensor() as largest:
        gather.run(q, k, v, selection, Options.of(q, k))
    # Nothing larger than the stated working memory, or one row that alone exceeds it.
    assert 0 < largest.bytes <= gather.WORK_BYTES
    with LargestTensor() as largest:
        reference.run(q, k, v, selection, Options.of(q, k))
    assert largest.bytes >= 4 * 4096 * 4096


def test_public_function_chooses_gather() -> None:
    case = SMALL[4]
    q, k, v = random_qkv(case)
    selection = random_selection(case, density=0.3)
    out = block_sparse_attention(q, k, v, selection)
    assert torch.equal(out, gather.run(q, k, v, selection, Options.of(q, k))[0])
    scaled = block_sparse_attention(q, k, v, selection, scale=0.5)
    assert torch.equal(scaled, gather.run(q, k, v, selection, Options.of(q, k, scale=0.5))[0])
    assert torch.equal(block_sparse_attention(q, k, v, selection, scale=0.5, backend="gather"), scaled)


def test_compiled_without_a_break() -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=100, keys=100, head_dim=16, block_size=(16, 16))
    # As models hand them over: heads after tokens in memory.
    qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(shape)]
    selection = random_selection(shape, density=0.4)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    out, plain = compiled(*qkv, selection), block_sparse_attention(*qkv, selection)
    assert torch.equal(out, plain)
    assert out.stride() == qkv[0].stride()
