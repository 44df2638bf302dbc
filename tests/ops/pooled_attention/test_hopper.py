from __future__ import annotations

from seerattention.ops.options import PoolOptions
from seerattention.ops.pooled_attention import BACKENDS
from seerattention.ops.shapes import Shape
from seerattention.testing.inputs import random_qkv


def test_the_hopper_backend_says_why_not() -> None:
    q, k, v = random_qkv(Shape(name="", heads=4, kv_heads=2, queries=300, keys=300, head_dim=64))
    backend, options = BACKENDS["hopper"], PoolOptions.of(q, k)
    assert "it needs a Hopper GPU" in backend.unsupported(q, k, v, (64, 64), options)
    assert backend.unsupported(q, k, None, (64, 64), options) == [
        "it computes the output, for which it needs v"
    ]
    refused = backend.unsupported(q, k, v, (64, 32), options)
    assert "blocks must be multiples of 64 tokens, got (64, 32)" in refused
    assert "it has no softcap" in backend.unsupported(q, k, v, (64, 64), PoolOptions.of(q, k, softcap=1.0))
    assert backend.unsupported(q, k, v, (64, 64), PoolOptions.of(q, k, pool="mass")) == [
        "it keeps the largest weights of blocks, not their mass"
    ]
