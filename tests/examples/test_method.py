"""The method on one page is what the library computes."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from seerattention import AttnGate, GateConfig, TopK, seer_attention
from seerattention.testing.budget import Budget

METHOD = Path(__file__).parents[2] / "examples" / "method.py"


@pytest.mark.parametrize("density", [0.02, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("tokens", [64, 600, 640])
@torch.no_grad()
def test_the_method_is_the_library(tokens, density):
    sparse_attention = runpy.run_path(str(METHOD))["sparse_attention"]
    gate = AttnGate(GateConfig.published("Qavg_Kmaxminavg", num_heads=4, num_kv_heads=2, head_dim=32))
    q, k, v = (torch.randn(2, heads, tokens, 32) for heads in (4, 2, 2))
    positions = torch.arange(tokens)
    out, selection = seer_attention(
        gate.rotate(q, positions), gate.rotate(k, positions), v, gate, TopK(density),
        q_scored=q, k_blocks=gate.compress(k, positions=positions), positions=positions,
    )  # fmt: skip
    _, read = sparse_attention(q, k, v, gate.linear_k.weight, density)
    assert torch.equal(selection.to_mask(), read)
    Budget.of(
        lambda *qkv: sparse_attention(*qkv, gate.linear_k.weight.to(qkv[0].dtype), density)[0], q, k, v
    ).check(out)


def test_the_method_runs(run_script):
    out = run_script(METHOD)
    rows = re.findall(r"^([\d.]+)% of the blocks read: ([\d.]+)% off dense attention$", out, re.M)
    read, off = ([float(row[i]) for row in rows] for i in (0, 1))
    assert len(rows) == 4
    assert read == sorted(read, reverse=True)
    assert read[-1] < 6
    assert off == sorted(off)
    assert off[-1] < 10
