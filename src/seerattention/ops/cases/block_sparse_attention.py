"""Named calls of `block_sparse_attention`."""

from __future__ import annotations

from dataclasses import dataclass

from seerattention.ops.cases import AttentionCase
from seerattention.ops.options import Options


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """A shape with a selection on it, and what else is asked for.

    Attributes:
        density: Fraction of the earlier blocks that are selected.
        selection_heads: Heads of the selection; default one per query head.
    """

    density: float = 0.3
    selection_heads: int | None = None

    def options(self, device: str = "cpu", *, return_lse: bool = False) -> Options:
        """Return the options of the case, its tensors on a device."""
        return Options(**self.asked(device, return_lse))


CASES = (
    Case(name="one-token", heads=4, kv_heads=2, queries=1, keys=1, head_dim=64),
    Case(name="below-block", heads=4, kv_heads=2, queries=63, keys=63, head_dim=64),
    Case(name="one-block", heads=4, kv_heads=2, queries=64, keys=64, head_dim=64),
    Case(name="block-plus-one", heads=4, kv_heads=2, queries=65, keys=65, head_dim=64),
    Case(name="thousand", heads=4, kv_heads=2, queries=1000, keys=1000, head_dim=64),
    Case(name="batch", heads=6, kv_heads=2, queries=200, keys=200, head_dim=64, batch=3),
    Case(name="one-kv-head", heads=4, kv_heads=1, queries=260, keys=260, head_dim=80),
    Case(name="no-groups", heads=3, kv_heads=3, queries=200, keys=200, head_dim=96),
    Case(name="wide-128", heads=4, kv_heads=2, queries=190, keys=190, head_dim=128),
    Case(name="wide-256", heads=2, kv_heads=1, queries=150, keys=150, head_dim=256),
    Case(name="kv-selection", heads=4, kv_heads=2, queries=333, keys=333, head_dim=64, selection_heads=2),
    Case(name="one-selection", heads=4, kv_heads=2, queries=333, keys=333, head_dim=64, selection_heads=1),
    Case(name="later-chunk", heads=4, kv_heads=2, queries=100, keys=420, head_dim=64),
    Case(name="unaligned-chunk", heads=4, kv_heads=2, queries=77, keys=301, head_dim=64),
    Case(name="last-token", heads=4, kv_heads=2, queries=1, keys=500, head_dim=64),
    Case(name="wide-rows", heads=4, kv_heads=2, queries=300, keys=300, head_dim=64, block_size=(128, 64)),
    Case(name="wide-columns", heads=4, kv_heads=2, queries=300, keys=300, head_dim=64, block_size=(32, 128)),
    Case(name="decode-rows", heads=4, kv_heads=2, queries=3, keys=600, head_dim=64, block_size=(1, 64)),
    Case(
        name="small-blocks",
        heads=4,
        kv_heads=2,
        queries=70,
        keys=401,
        head_dim=64,
        density=0.15,
        block_size=(32, 32),
    ),
    Case(name="big-blocks", heads=4, kv_heads=2, queries=150, keys=900, head_dim=128, block_size=(128, 128)),
    Case(name="many-words", heads=2, kv_heads=1, queries=70, keys=1200, head_dim=64, block_size=(64, 16)),
    Case(
        name="teacher-8k", heads=6, kv_heads=2, queries=8192, keys=8192, head_dim=64, density=0.1, large=True
    ),
    Case(
        name="teacher-16k",
        heads=6,
        kv_heads=2,
        queries=16384,
        keys=16384,
        head_dim=64,
        density=0.1,
        large=True,
    ),
    Case(
        name="llama-8b-32k",
        heads=32,
        kv_heads=8,
        queries=32768,
        keys=32768,
        head_dim=128,
        density=0.1,
        large=True,
    ),
)

#: What not every backend takes.
OPTION_CASES = (
    Case(name="softcap", heads=4, kv_heads=2, queries=150, keys=300, head_dim=64, softcap=2.0),
    Case(name="sinks", heads=4, kv_heads=2, queries=150, keys=300, head_dim=64, sinks=True),
    Case(
        name="softcap-and-sinks",
        heads=2,
        kv_heads=2,
        queries=90,
        keys=90,
        head_dim=80,
        softcap=30.0,
        sinks=True,
    ),
    Case(
        name="packed",
        heads=4,
        kv_heads=2,
        queries=284,
        keys=414,
        head_dim=64,
        lengths=((130, 130), (1, 1), (0, 0), (63, 193), (90, 90)),
    ),
    Case(
        name="packed-with-all",
        heads=4,
        kv_heads=2,
        queries=164,
        keys=294,
        head_dim=96,
        block_size=(32, 64),
        selection_heads=2,
        lengths=((100, 100), (64, 194)),
        softcap=3.0,
        sinks=True,
    ),
)
