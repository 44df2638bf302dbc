"""Dense attention of queries that are the last of more keys: by the sparse kernels, nothing left out."""

import pytest
import torch

from seerattention.ops import dense_attention as module
from seerattention.ops.dense_attention import dense_attention
from seerattention.testing.budget import Budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [2, 37, 64, 700])
@pytest.mark.parametrize("option", ["plain", "softcap", "sinks"])
def test_later_queries(monkeypatch, dtype, queries, option):
    torch.manual_seed(0)
    q = torch.randn(2, 8, queries, 128, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 2, 2, 2011, 128, device="cuda", dtype=dtype)
    sinks = torch.randn(8, device="cuda") if option == "sinks" else None
    softcap = 5.0 if option == "softcap" else None

    def run(q, k, v):
        return dense_attention(q, k, v, scale=128**-0.5, softcap=softcap, sinks=sinks)

    with monkeypatch.context() as own:
        # Torch's way, which others than 16 bits take.
        own.setattr(module, "HALF", ())
        budget = Budget.of(run, q, k, v)
    budget.check(run(q, k, v))
