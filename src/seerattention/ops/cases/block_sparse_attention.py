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
    Case(name="one-token", queries=1),
    Case(name="below-block", queries=63),
    Case(name="one-block", queries=64),
    Case(name="block-plus-one", queries=65),
    Case(name="thousand", queries=1000),
    Case(name="batch", heads=6, queries=200, batch=3),
    Case(name="one-kv-head", kv_heads=1, queries=260, head_dim=80),
    Case(name="no-groups", heads=3, kv_heads=3, queries=200, head_dim=96),
    Case(name="wide-128", queries=190, head_dim=128),
    Case(name="wide-256", heads=2, kv_heads=1, queries=150, head_dim=256),
    Case(name="kv-selection", queries=333, selection_heads=2),
    Case(name="one-selection", queries=333, selection_heads=1),
    Case(name="later-chunk", queries=100, keys=420),
    Case(name="unaligned-chunk", queries=77, keys=301),
    Case(name="last-token", queries=1, keys=500),
    Case(name="wide-rows", queries=300, block_size=(128, 64)),
    Case(name="wide-columns", queries=300, block_size=(32, 128)),
    Case(name="decode-rows", queries=3, keys=600, block_size=(1, 64)),
    Case(name="small-blocks", queries=70, keys=401, block_size=(32, 32), density=0.15),
    Case(name="big-blocks", queries=150, keys=900, head_dim=128, block_size=(128, 128)),
    Case(name="many-words", heads=2, kv_heads=1, queries=70, keys=1200, block_size=(64, 16)),
    Case(name="teacher-8k", heads=6, queries=8192, large=True, density=0.1),
    Case(name="teacher-16k", heads=6, queries=16384, large=True, density=0.1),
    Case(name="llama-8b-32k", heads=32, kv_heads=8, queries=32768, head_dim=128, large=True, density=0.1),
)

#: What not every backend takes.
OPTION_CASES = (
    Case(name="softcap", queries=150, keys=300, softcap=2.0),
    Case(name="sinks", queries=150, keys=300, sinks=True),
    Case(name="softcap-and-sinks", heads=2, queries=90, head_dim=80, softcap=30.0, sinks=True),
    Case(name="packed", queries=284, keys=414, lengths=((130, 130), (1, 1), (0, 0), (63, 193), (90, 90))),
    Case(
        name="packed-with-all",
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
