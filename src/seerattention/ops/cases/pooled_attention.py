"""Named calls of `pooled_attention`."""

from __future__ import annotations

from dataclasses import dataclass

from seerattention.ops.cases import AttentionCase
from seerattention.ops.options import Pool, PoolOptions


@dataclass(frozen=True, kw_only=True)
class PoolCase(AttentionCase):
    """A shape, and what else is asked for.

    Attributes:
        per_kv_head: Whether the heads of a group share one map.
        pool: What a block pair gets of its weights.
    """

    per_kv_head: bool = False
    pool: Pool = "max"

    def options(self, device: str = "cpu", *, return_lse: bool = False) -> PoolOptions:
        """Return the options of the case, its tensors on a device."""
        asked = self.asked(device, return_lse)
        return PoolOptions(per_kv_head=self.per_kv_head, pool=self.pool, **asked)


CASES = (
    # Several, since the error of a reference that computes four numbers is a matter of luck.
    PoolCase(name="one-token", queries=1, batch=16),
    PoolCase(name="below-block", queries=63),
    PoolCase(name="one-block", queries=64),
    PoolCase(name="block-plus-one", queries=65),
    PoolCase(name="thousand", queries=1000),
    PoolCase(name="batch", heads=6, queries=200, head_dim=80, batch=3),
    PoolCase(name="no-groups", heads=3, kv_heads=3, queries=200, head_dim=96),
    PoolCase(name="wide-128", kv_heads=1, queries=190, head_dim=128),
    PoolCase(name="wide-256", heads=2, kv_heads=1, queries=150, head_dim=256),
    PoolCase(name="later-chunk", queries=100, keys=420),
    PoolCase(name="last-token", queries=1, keys=500),
    PoolCase(name="wide-rows", queries=300, block_size=(128, 64)),
    PoolCase(name="small-blocks", queries=90, block_size=(8, 16)),
    PoolCase(name="block-row", heads=2, kv_heads=1, queries=140, keys=300, block_size=(128, 128)),
    PoolCase(name="narrow-columns", heads=2, kv_heads=1, queries=100, keys=200, block_size=(32, 16)),
    PoolCase(name="group", heads=6, queries=150, keys=190, per_kv_head=True),
    PoolCase(name="decode", heads=6, queries=70, keys=170, block_size=(1, 32), per_kv_head=True),
    PoolCase(name="token-rows", queries=70, keys=170, block_size=(1, 64)),
    PoolCase(name="softcap", queries=150, keys=200, softcap=2.0),
    PoolCase(name="sinks", queries=150, keys=200, sinks=True),
    PoolCase(name="packed", queries=284, keys=414, lengths=((130, 130), (1, 1), (0, 0), (63, 193), (90, 90))),
    PoolCase(
        name="packed-decode",
        queries=164,
        keys=294,
        head_dim=96,
        block_size=(1, 16),
        per_kv_head=True,
        lengths=((100, 100), (64, 194)),
        softcap=3.0,
        sinks=True,
    ),
    PoolCase(name="mass", queries=150, keys=237, pool="mass"),
    PoolCase(
        name="mass-group",
        heads=6,
        queries=150,
        keys=190,
        block_size=(128, 32),
        per_kv_head=True,
        sinks=True,
        pool="mass",
    ),
    PoolCase(
        name="mass-decode",
        heads=6,
        queries=70,
        keys=170,
        block_size=(1, 32),
        per_kv_head=True,
        softcap=2.0,
        pool="mass",
    ),
    PoolCase(
        name="mass-packed",
        queries=284,
        keys=414,
        block_size=(64, 128),
        sinks=True,
        lengths=((130, 130), (1, 1), (0, 0), (63, 193), (90, 90)),
        pool="mass",
    ),
    PoolCase(name="teacher-8k", heads=6, queries=8192, large=True),
    PoolCase(name="teacher-16k", heads=6, queries=16384, large=True),
    PoolCase(name="llama-8b-32k", heads=32, kv_heads=8, queries=32768, head_dim=128, large=True),
    PoolCase(name="llama-8b-8k", heads=32, kv_heads=8, queries=8192, head_dim=128, large=True),
    PoolCase(name="llama-8b-128k", heads=32, kv_heads=8, queries=131072, head_dim=128, large=True),
)
