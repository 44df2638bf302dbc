"""Named calls of `select_decode_blocks` and `update_summaries`, for their tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from seerattention.ops.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class Case(Shape):
    """A cache of ``keys`` tokens a sequence, as a rule of four heads of 32 that share two, and a gate.

    Attributes:
        queries: Tokens that are decoded at once.
        held: Keys of every sequence; default as many as the cache has room for.
        gate: Settings of the gate that differ from one summary per block and a score per KV head.
    """

    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    head_dim: int = 32
    block_size: tuple[int, int] = (1, 16)
    held: tuple[int, ...] = ()
    gate: dict[str, Any] = field(default_factory=dict)

    @property
    def design(self) -> dict[str, Any]:
        """Arguments of the gate's configuration."""
        sizes = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.head_dim}
        whole = {"per_kv_head": True, "q_sub_block": 1, "k_sub_block": None}
        return {**sizes, "block_size": self.block_size[1], **whole, **self.gate}


#: A summary of 16 numbers for every key token.
EACH_TOKEN: dict[str, Any] = {"k_sub_block": 1, "k_pool": ("avg",), "q_pool": ("avg",), "gate_dim": 16}

CASES = (
    Case(name="one-token", keys=300),
    Case(name="finishes-a-block", keys=320),
    Case(name="nothing-finished", keys=64, held=(9,)),
    Case(name="ragged", batch=6, keys=512, held=(1, 15, 16, 17, 300, 512)),
    Case(name="drafted", batch=3, queries=5, keys=256, held=(256, 67, 3)),
    Case(name="many-drafted", queries=15, keys=200, held=(170,)),
    Case(name="sub-blocks", batch=2, keys=400, held=(400, 161), gate={"k_sub_block": 4}),
    Case(name="two-sub-blocks", queries=2, keys=256, gate={"k_sub_block": 8, "qk_norm": True}),
    Case(name="narrow", keys=256, gate={"gate_dim": 24, "qk_norm": True, "q_pool": ("avg",)}),
    Case(name="still", keys=256, gate={"rope": False, "k_pool": ("max", "min")}),
    Case(name="not-a-power-of-two", keys=280, head_dim=40, block_size=(1, 20), gate={"gate_dim": 40}),
    Case(name="big-group", heads=12, kv_heads=1, keys=200, queries=2),
    Case(name="a-head-each", heads=2, kv_heads=2, keys=200),
    Case(name="several-tiles", keys=1700, held=(1699,)),
    Case(name="each-token", batch=3, keys=900, held=(899, 16, 5), gate=EACH_TOKEN),
    Case(name="each-token-drafted", batch=3, queries=5, keys=400, held=(400, 67, 3), gate=EACH_TOKEN),
    Case(name="each-token-of-64", keys=1000, head_dim=64, block_size=(1, 64), gate=EACH_TOKEN),
    Case(name="each-of-20", queries=2, keys=420, block_size=(1, 20), gate=EACH_TOKEN | {"gate_dim": 24}),
    Case(name="three-sub-blocks", keys=500, head_dim=128, block_size=(1, 24), gate={"k_sub_block": 8}),
)


def _llama(name: str, keys: int, **options: Any) -> Case:
    sizes: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": (1, 64)}
    return Case(name=name, keys=keys, **sizes | options)


#: For a GPU.
LARGE = (
    _llama("llama-8b-32k", 32768),
    _llama("llama-8b-128k", 131072, held=(131000,), gate={"k_sub_block": 16}),
    _llama("llama-8b-drafted", 8192, batch=3, queries=4, held=(8192, 8000, 77), gate={"k_sub_block": 32}),
    _llama("llama-8b-batch", 4096, batch=70, gate={"gate_dim": 128}),
    _llama("each-token-32k", 32768, gate=EACH_TOKEN),
    _llama("each-token-128k", 131072, batch=3, held=(131072, 131000, 70), gate=EACH_TOKEN),
    _llama("each-token-drafted", 8192, batch=3, queries=4, held=(8192, 8000, 77), gate=EACH_TOKEN),
    _llama("each-token-drafted-64", 4096, head_dim=64, queries=40, held=(4090,), gate=EACH_TOKEN),
    _llama("each-token-of-32-numbers", 32768, batch=5, gate=EACH_TOKEN | {"gate_dim": 32}),
    _llama("many-blocks", 65536, block_size=(1, 16), held=(65535,)),
)
