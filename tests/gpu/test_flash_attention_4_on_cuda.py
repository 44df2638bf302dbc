"""FlashAttention-4, where it is installed, computes what dense attention computes without it."""

import pytest
import torch

from seerattention.ops import dense_attention as module
from seerattention.ops import flash_attention_4
from seerattention.ops.dense_attention import dense_attention
from seerattention.testing.budget import Budget

#: What it imports warns, and its compiler of every argument that is None.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Argument .* cannot be converted:UserWarning"),
]


@pytest.fixture(autouse=True)
def _installed():
    x = torch.empty(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16)
    if reasons := flash_attention_4.unsupported(x, x, x):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("tokens", [1, 37, 1003])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_dense_attention(monkeypatch, tokens, kv_heads):
    torch.manual_seed(0)
    q = torch.randn(2, 8, tokens, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, kv_heads, tokens, 128, device="cuda", dtype=torch.bfloat16)

    def run(q, k, v):
        return dense_attention(q, k, v, scale=128**-0.5)

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
