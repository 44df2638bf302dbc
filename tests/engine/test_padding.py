"""Dense attention of padded batches is that of their rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seerattention.engine.padding import Padding
from seerattention.ops.dense_attention import dense_attention
from seerattention.testing.budget import Budget

REAL = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0], [1] * 9],
    "between": [[1, 1, 0, 0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 0, 0, 0, 0], [1] * 9],
}
OPTIONS = [{}, {"window": 3}, {"softcap": 2.0}, {"sinks": True, "window": 4}]


@pytest.mark.parametrize("queries", [1, 4, 9])
@pytest.mark.parametrize("side", REAL)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_padded_batch(queries: int, side: str, options: dict, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(queries)
    q, k, v = (
        torch.randn(3, heads, tokens, 8, generator=generator).to(dtype)
        for heads, tokens in ((4, queries), (2, 9), (2, 9))
    )
    real = torch.tensor(REAL[side], dtype=torch.bool)
    options = {"scale": 0.5, **options}
    if options.get("sinks"):
        options["sinks"] = torch.randn(4, generator=generator)
    padding = Padding.of(real, queries)
    assert padding is not None
    out = padding.dense(q, k, v, **options)
    new = real[:, -queries:]
    assert not out.transpose(1, 2)[~new].any()
    for row in range(3):
        if not new[row].any():
            continue

        def alone(q: Tensor, k: Tensor, v: Tensor, row: int = row) -> Tensor:
            one = slice(row, row + 1)
            keys, values = k[one][:, :, real[row]], v[one][:, :, real[row]]
            return dense_attention(q[one][:, :, new[row]], keys, values, **options)

        Budget.of(alone, q, k, v).check(out[row : row + 1, :, new[row]])


def test_without_padding_there_is_none() -> None:
    assert Padding.of(torch.ones(2, 5, dtype=torch.bool), 3) is None


def test_padding_of_a_batch() -> None:
    padding = Padding.of(torch.tensor(REAL["between"], dtype=torch.bool), 4)
    assert padding is not None
    assert padding.rows.known == ((3, 6), (0, 3), (4, 9))
    assert padding.between == [True, False, False]
    assert padding.first(torch.tensor([[20, 21, 22, 23]])).tolist()[::2] == [17, 15]
    x = torch.arange(27.0).view(3, 1, 9, 1)
    assert padding.keys.pack(x).flatten().tolist() == [0, 1, 4, 5, 6, 8, 11, 12, 13, *range(18, 27)]
    assert padding.keys.align(x)[0].flatten().tolist() == [0, 1, 4, 5, 6, 8, 0, 0, 0]
    real = padding.keys.real[:, None, :, None]
    assert torch.equal(padding.keys.unpack(padding.keys.pack(x)), x * real)
    wide = torch.randn(3, 2, 9, 4)
    out = padding.keys.unpack(padding.keys.pack(wide))
    assert torch.equal(out, wide * real)
    # Models join the heads of a token without a copy.
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(padding.keys.unalign(padding.keys.align(x)), x * real)
    part = padding.part([2, 0])
    assert part.rows.known == ((4, 9), (3, 6))
