"""What a run of the prefill benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from seerattention.bench.masks import MASKS
from seerattention.gate import AttnGate, GateConfig
from seerattention.ops.shapes import Shape

#: Gate designs.
GATES = ("published", "sub16", "sub8", "default")


class Reporter(Protocol):
    """Hears how far a run is."""

    def stage(self, what: str, steps: int) -> None:
        """A part of the run begins that takes so many steps."""

    def step(self, name: str) -> None:
        """One step is done."""

    def note(self, text: str) -> None:
        """Something the reader of the results must know, such as what was left out and why."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Shapes, selections and peers of one run.

    Attributes:
        tokens: Sequence lengths.
        densities: Shares of the blocks to read, in (0, 1]. A share of 1 is measured once per length and
            block size, since all masks are alike there.
        blocks: Tokens per block.
        masks: Any of ``MASKS``.
        gates: Designs from ``GATES`` whose selection is timed, with random weights.
        peers: Any of ``cudnn``, ``fa2``, ``flex``; on a CPU dense SDPA is always there.
        extra: Further peers as ``module:function``.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Dimension of a head.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu`` or ``cuda``.
        repeats: Timed rounds.
        teacher_tokens: Length of the text that gate masks are made from.
        layer_density: Density of the selections that whole layers make.
    """

    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    blocks: tuple[int, ...]
    masks: tuple[str, ...]
    gates: tuple[str, ...]
    peers: tuple[str, ...]
    extra: tuple[str, ...] = ()
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    repeats: int = 5
    teacher_tokens: int = 8192
    layer_density: float = 0.1

    def __post_init__(self) -> None:
        known = {
            "masks": (self.masks, MASKS),
            "gates": (self.gates, GATES),
            "peers": (self.peers, ("cudnn", "fa2", "flex")),
            "dtype": ((self.dtype,), ("float32", "bfloat16", "float16")),
            "device": ((self.device,), ("cpu", "cuda")),
        }
        for name, (given, allowed) in known.items():
            for value in given:
                if value not in allowed:
                    raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"densities must be in (0, 1], got {density}")
        counts = {"tokens": self.tokens, "blocks": self.blocks, "repeats": (self.repeats,)}
        for name, values in counts.items():
            for value in values:
                if value < 1:
                    raise ValueError(f"{name} must be a whole number >= 1, got {value}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads, {self.heads}, must be a multiple of kv_heads, {self.kv_heads}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda needs a CUDA device, and torch sees none")

    @property
    def kind(self) -> torch.dtype:
        """The dtype as torch's."""
        return getattr(torch, self.dtype)

    def shape(self, tokens: int, block: int) -> Shape:
        """Return the sizes of one call."""
        return Shape(
            name=f"{tokens}x{block}",
            heads=self.heads,
            kv_heads=self.kv_heads,
            queries=tokens,
            keys=tokens,
            head_dim=self.head_dim,
            block_size=(block, block),
        )

    def gate(self, name: str, block: int) -> AttnGate:
        """Return a gate of a named design, with random weights in the plan's dtype."""
        sizes = self.heads, self.kv_heads, self.head_dim
        torch.manual_seed(0)
        if name == "published":
            heads, kv_heads, head_dim = sizes
            config = GateConfig.published(
                num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, block_size=block
            )
        elif name in ("sub16", "sub8"):
            # Sub-blocks of so many tokens, summaries of whole heads.
            sub = int(name.removeprefix("sub"))
            config = GateConfig(*sizes, block, self.head_dim, q_sub_block=sub, k_sub_block=sub)
        else:
            config = GateConfig(*sizes, block_size=block)
        return AttnGate(config).to(self.device, self.kind).requires_grad_(False)


#: Defaults per device type: on a GPU the shape of Llama 3.1 8B, on a CPU that of the bundled teacher.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "tokens": (4096, 8192, 16384),
        "densities": (0.2, 0.1, 0.05),
        "blocks": (64,),
        "masks": ("random",),
        "gates": ("published", "default"),
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 64,
        "dtype": "float32",
    },
    "cuda": {
        "tokens": (8192, 32768, 131072),
        "densities": (1.0, 0.5, 0.2, 0.1, 0.05, 0.02),
        "blocks": (64, 128),
        "masks": ("random", "gate"),
        "gates": ("published", "sub16"),
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
    },
}
