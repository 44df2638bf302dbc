"""FlexAttention compiles for seconds per kind of call: few kinds here, each through many checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention import flex
from seerattention.ops.cases.block_sparse_attention import CASES
from seerattention.ops.options import Options
from seerattention.rows import Rows
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv

# torch's own import of its compiler uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

CASE = {case.name: case for case in CASES}


def test_conforms() -> None:
    conformance.check_attention(flex, CASE["later-chunk"])


def test_rows_in_half_precision() -> None:
    conformance.attention_matches_reference(flex, CASE["thousand"], torch.bfloat16)
    conformance.attention_rows_are_isolated(flex, CASE["thousand"], torch.bfloat16)


@pytest.mark.parametrize("name", ["one-token", "wide-rows"])
def test_odd_sizes(name: str) -> None:
    conformance.attention_matches_reference(flex, CASE[name])


def test_a_new_length_is_not_a_new_compilation() -> None:
    torch._dynamo.utils.counters.clear()
    for tokens in (200, 300, 333, 400, 512, 600, 650, 700, 800, 900, 1000):
        case = CASE["thousand"]
        q, k, v = (x[:, :, :tokens] for x in random_qkv(case))
        full = BlockSelection.full(Rows.last(tokens, tokens), (64, 64))
        out = block_sparse_attention(q, k, v, full, backend="flex")
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out, expected)
    # Nor is autocast, which changes nothing.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block_sparse_attention(q, k, v, full, backend="flex"), out)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_reasons_why_not() -> None:
    q, k, v = random_qkv(CASE["one-block"])
    full, options = BlockSelection.full(Rows.last(64, 64), (64, 64)), Options.of(q, k)
    assert flex.unsupported(q, k, v, full, options) == []
    double = [x.double() for x in (q, k, v)]
    assert flex.unsupported(*double, full, options) == ["it has no float64 kernel"]
    leaf = q.clone().requires_grad_()
    assert flex.unsupported(leaf, k, v, full, options) == ["it has no backward on a CPU"]
    asked = replace(options, softcap=1.0, sinks=torch.zeros(4), return_lse=True)
    assert flex.unsupported(q, k, v, full, asked) == [
        "it takes no softcap",
        "it takes no sinks",
        "it takes no return_lse",
    ]
    with torch.no_grad():
        assert flex.unsupported(q.clone().requires_grad_(), k, v, full, options) == []
    meta = [x.to("meta") for x in (q, k, v)]
    assert flex.unsupported(*meta, full, options) == ["it runs on cpu and cuda, not on meta"]
    with pytest.raises(NotImplementedError, match="flex: it has no float64 kernel"):
        block_sparse_attention(q.double(), k.double(), v.double(), full, backend="flex")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    q, k, v = random_qkv(CASE["one-block"])
    full = BlockSelection.full(Rows.last(64, 64), (64, 64))
    (reason,) = flex.unsupported(q, k, v, full, Options.of(q, k))
    assert reason == "on a CPU it is compiled by a C++ compiler, and none is on the PATH"
