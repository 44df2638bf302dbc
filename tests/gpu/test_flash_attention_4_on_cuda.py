"""FlashAttention-4, where it is installed, computes what dense attention computes without it."""

import pytest
import torch

from seerattention.ops import dense_attention as module
from seerattention.ops import flash_attention_4
from seerattention.ops.dense_attention import dense_attention
from seerattention.testing.budget import Budget

#: What it imports warns.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OPTIONS = {
    "plain": {},
    "window": {"window": 129},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 64, "sinks": True},
}


@pytest.fixture(autouse=True)
def _installed():
    x = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    if reasons := flash_attention_4.unsupported(x, x, x):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("queries", [1003, 37])
@pytest.mark.parametrize("option", list(OPTIONS))
def test_dense_attention(monkeypatch, dtype, dim, queries, option):
    torch.manual_seed(0)
    q = torch.randn(2, 8, queries, dim, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 2, 2, 1003, dim, device="cuda", dtype=dtype)
    options = dict(OPTIONS[option])
    if "sinks" in options:
        options["sinks"] = torch.randn(8, device="cuda")

    def run(q, k, v):
        return dense_attention(q, k, v, scale=dim**-0.5, **options)

    with monkeypatch.context() as own:
        own.setattr(flash_attention_4, "pays", lambda *_: False)
        # Torch's way, which others than 16 bits take.
        own.setattr(module, "HALF", ())
        budget = Budget.of(run, q, k, v)
    monkeypatch.setattr(flash_attention_4, "pays", lambda *_: True)
    budget.check(run(q, k, v))
    assert torch.equal(run(q, k, v), run(q, k, v))


def test_layouts_of_models(monkeypatch):
    """Heads behind tokens in memory, and keys with room behind them."""
    monkeypatch.setattr(flash_attention_4, "pays", lambda *_: True)
    torch.manual_seed(0)
    q = torch.randn(1, 300, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    room = torch.randn(2, 1, 2, 512, 128, device="cuda", dtype=torch.bfloat16)
    k, v = room[:, :, :, :300]
    out = dense_attention(q, k, v, scale=0.1)
    torch.testing.assert_close(out, dense_attention(q.clone(), k.clone(), v.clone(), scale=0.1))
