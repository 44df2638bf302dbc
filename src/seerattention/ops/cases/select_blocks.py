"""Named calls of `select_blocks`, for its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from seerattention.ops.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class Case(Shape):
    """A shape with a gate.

    Attributes:
        published: Take the published design instead of the default one.
        gate: Settings of the gate that differ from the design.
    """

    published: bool = False
    gate: dict[str, Any] = field(default_factory=dict)

    @property
    def design(self) -> dict[str, Any]:
        """Arguments of a gate's configuration, but for ``published``."""
        sizes = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {**sizes, "block_size": self.block_size[0], "gate_dim": self.head_dim, **self.gate}


SIXTEEN = {"q_sub_block": 16, "k_sub_block": 16}
EIGHT = {"q_sub_block": 8, "k_sub_block": 8}
EIGHT_BITS = {"score_dtype": "float8_e4m3fn"}
WHOLE = {"q_sub_block": None, "k_sub_block": None}


def _case(name: str, queries: int, keys: int | None = None, **options: Any) -> Case:
    sizes: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 16} | options
    return Case(name=name, queries=queries, keys=keys or queries, **sizes)


def _packed(name: str, lengths: tuple[tuple[int, int], ...], **options: Any) -> Case:
    queries, keys = (sum(one) for one in zip(*lengths, strict=True))
    return _case(name, queries, keys, lengths=lengths, **options)


#: Of blocks of 16 tokens: less than one, one, a token more, odd ones, a later piece, none, a decoded token.
ODD = ((1, 1), (15, 15), (16, 16), (17, 17), (63, 63), (20, 75), (0, 40), (40, 40), (1, 33))


def _llama(name: str, tokens: int, **options: Any) -> Case:
    return _case(name, tokens, heads=32, kv_heads=8, head_dim=128, large=True, **options)


CASES = (
    _case("one-token", 1),
    _case("below-block", 63),
    _case("one-block", 64),
    _case("block-plus-one", 65, gate=SIXTEEN),
    _case("thousand", 1000, gate=SIXTEEN),
    _case("eight", 700, gate=EIGHT),
    _case("no-sub-blocks", 1000, gate=WHOLE),
    _case("published", 600, published=True, heads=4, kv_heads=2),
    _case("batch", 300, batch=3, gate=WHOLE, heads=4, kv_heads=2),
    _case("one-score-per-kv-head", 500, gate={**WHOLE, "per_kv_head": True}, heads=4, kv_heads=2),
    _case("every-query", 200, gate={**WHOLE, "q_sub_block": 1, "per_kv_head": True}, heads=4, kv_heads=2),
    _case("uneven-sub-blocks", 330, gate={"q_sub_block": 32, "k_sub_block": 16}),
    _case("later-chunk", 128, 1000, gate=SIXTEEN),
    _case("unaligned-chunk", 77, 431, gate=SIXTEEN),
    _case("last-token", 1, 500, gate=SIXTEEN),
    _case("small-blocks", 150, block_size=(8, 8), gate=WHOLE),
    _case("not-a-power-of-two", 300, head_dim=40, gate={**WHOLE, "gate_dim": 24, "qk_norm": True}),
    _case("in-two-parts", 300, head_dim=64, gate={**SIXTEEN, "gate_dim": 48}),
    _case("shares", 500, gate={**SIXTEEN, "shares": True}, heads=4, kv_heads=2),
    _case("shares-four", 330, heads=1, gate={"shares": True}),
    _case("shares-unaligned-chunk", 77, 431, gate={**EIGHT, "shares": True}),
    # Its last summary of queries would end in a block that there is not.
    _case("shares-cut-short", 61, 128, gate={"shares": True}),
    _case("shares-uneven", 200, block_size=(16, 16), gate={**EIGHT, "q_sub_block": 2, "shares": True}),
    _case(
        "shares-of-8-bits", 700, block_size=(16, 16), heads=4, kv_heads=2, gate=EIGHT_BITS | {"shares": True}
    ),
    _case("products-of-8-bits", 700, block_size=(16, 16), gate=EIGHT_BITS | EIGHT),
    _packed("packed", ODD, block_size=(16, 16), gate={"q_sub_block": 4, "k_sub_block": 8}),
    _packed("packed-shares", ODD, block_size=(16, 16), gate={**EIGHT, "shares": True}),
    _packed("packed-of-8-bits", ODD, block_size=(16, 16), gate=EIGHT_BITS | EIGHT | {"shares": True}),
    _packed("packed-whole", ODD[3:7], block_size=(16, 16), gate=WHOLE, heads=4, kv_heads=2),
    _packed("packed-per-kv-head", ODD[4:], block_size=(16, 16), gate={**WHOLE, "per_kv_head": True}),
    _llama("published-32k", 32768, published=True),
    _llama("published-128k", 131072, published=True),
    _llama("sixteen-32k", 32768, gate=SIXTEEN),
    _llama("sixteen-128k", 131072, gate=SIXTEEN),
    _llama("eight-32k", 32768, gate=EIGHT),
    _llama("eight-128k", 131072, gate=EIGHT),
    _llama("products-32k", 32768, gate={"gate_dim": None}),
    _llama("products-128k", 131072, gate={"gate_dim": None}),
    _llama("default-32k", 32768, gate={"gate_dim": None, "shares": True}),
    _llama("default-128k", 131072, gate={"gate_dim": None, "shares": True}),
    _llama("8x4-32k", 32768, gate={"gate_dim": None, "shares": True, "q_sub_block": 8}),
    _llama("8x4-128k", 131072, gate={"gate_dim": None, "shares": True, "q_sub_block": 8}),
    _llama("8-bits-32k", 32768, gate={"gate_dim": None, "shares": True, **EIGHT_BITS}),
    _llama("8-bits-128k", 131072, gate={"gate_dim": None, "shares": True, **EIGHT_BITS}),
    _llama("8x4-8-bits-32k", 32768, gate={"gate_dim": None, "shares": True, "q_sub_block": 8, **EIGHT_BITS}),
    _llama(
        "8x4-8-bits-128k", 131072, gate={"gate_dim": None, "shares": True, "q_sub_block": 8, **EIGHT_BITS}
    ),
)
