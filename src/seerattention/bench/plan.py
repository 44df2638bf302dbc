"""What a run of a benchmark measures."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from seerattention import baselines
from seerattention.bench.masks import MASKS
from seerattention.device import capability
from seerattention.gate import AttnGate
from seerattention.gate_config import GateConfig, design_of
from seerattention.measure.versions import versions
from seerattention.ops.shapes import Shape
from seerattention.scorer import Scorer

#: Gate designs; the last is the default with scores in eight bits.
GATES = ("published", "sub16", "sub8", "default", "8-bits")


class Reporter(Protocol):
    """Hears how far a run is."""

    def stage(self, what: str, steps: int) -> None:
        """A part of the run begins that takes so many steps."""

    def step(self, name: str) -> None:
        """One step is done."""

    def note(self, text: str) -> None:
        """Something the reader of the results must know, such as what was left out and why."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Heads, machine and rounds of a run.

    Attributes:
        extra: Further peers by name.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Dimension of a head.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu`` or ``cuda``.
        repeats: Timed rounds.
    """

    extra: tuple[str, ...] = ()
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    repeats: int = 5

    def __post_init__(self) -> None:
        self.among(dtype=((self.dtype,), ("float32", "bfloat16", "float16")))
        self.among(device=((self.device,), ("cpu", "cuda")))
        self.counts(repeats=(self.repeats,))
        if self.heads % self.kv_heads:
            raise ValueError(f"heads, {self.heads}, must be a multiple of kv_heads, {self.kv_heads}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda needs a CUDA device, and torch sees none")

    @staticmethod
    def among(**known: tuple[Iterable[str], tuple[str, ...]]) -> None:
        """Refuse names that are none of those allowed."""
        for name, (given, allowed) in known.items():
            for value in given:
                if value not in allowed:
                    raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    @staticmethod
    def counts(**counts: Iterable[int]) -> None:
        """Refuse counts below one."""
        for name, values in counts.items():
            for value in values:
                if value < 1:
                    raise ValueError(f"{name} must be a whole number >= 1, got {value}")

    @staticmethod
    def shares(densities: Iterable[float]) -> None:
        """Refuse densities that are no shares."""
        for density in densities:
            if not 0 < density <= 1:
                raise ValueError(f"densities must be in (0, 1], got {density}")

    @property
    def kind(self) -> torch.dtype:
        """The dtype as torch's."""
        return getattr(torch, self.dtype)

    def about(self) -> dict[str, Any]:
        """Return what every report says of its run."""
        return {
            "versions": versions(self.device),
            "date": datetime.now(UTC).date().isoformat(),
            "device_type": self.device,
            "capability": capability(self.device),
            "dtype": self.dtype,
            "shape": {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim},
            "repeats": self.repeats,
        }

    def made(self, config: GateConfig) -> AttnGate:
        """Return a gate of a design, with random weights in this dtype."""
        torch.manual_seed(0)
        return AttnGate(config).to(self.device, self.kind).requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Plan(Setting):
    """Shapes, selections and peers of one run of prefill.

    Attributes:
        tokens: Sequence lengths.
        densities: Shares of the blocks to read, in (0, 1]. A share of 1 is measured once per length and
            block size, since all masks are alike there.
        blocks: Tokens per block.
        masks: Any of ``MASKS``.
        gates: Designs from ``GATES`` whose selection is timed, with random weights.
        pages: Tokens per page of the keys and values in pages that are timed, too.
        peers: Any of ``cudnn``, ``fa2``, ``fa4``, ``flex``; on a CPU dense SDPA is always there.
        extra: Further peers as ``module:function``.
        teacher_tokens: Length of the text that gate masks are made from.
        layer_density: Density of the selections that whole layers make.
    """

    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    blocks: tuple[int, ...]
    masks: tuple[str, ...]
    gates: tuple[str, ...]
    pages: tuple[int, ...] = ()
    peers: tuple[str, ...]
    teacher_tokens: int = 8192
    layer_density: float = 0.1

    def __post_init__(self) -> None:
        self.among(
            masks=(self.masks, MASKS),
            gates=(self.gates, GATES),
            peers=(self.peers, ("cudnn", "fa2", "fa4", "flex")),
        )
        self.shares(self.densities)
        self.counts(tokens=self.tokens, blocks=self.blocks, pages=self.pages)
        super().__post_init__()

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
            shape = dict(zip(("num_heads", "num_kv_heads", "head_dim"), sizes, strict=True))
            dtype = {"score_dtype": "float8_e4m3fn"} if name == "8-bits" else {}
            config = GateConfig.from_dict(design_of({**shape, "block_size": block, **dtype}))
        return self.made(config)


@dataclass(frozen=True, kw_only=True)
class DecodePlan(Setting):
    """Caches, selections and peers of one run of decoding, a token per sequence.

    Attributes:
        sizes: Pairs of sequences and tokens of each, whole blocks and whole pages.
        density: Share of the blocks to read, in (0, 1].
        block: Tokens per block.
        gates: Whose choosing is timed, with random weights: ``default``, the design for decoding;
            ``sub<n>``, the same with a summary of every ``n`` key tokens; or ``quest``, Quest's rule.
        pages: Tokens per page of the paged caches that are timed, too.
        peers: Any of ``cudnn`` and ``fa2``; on a CPU dense SDPA is always there.
        extra: Further peers, ``flashinfer`` or ``module:function``.
    """

    sizes: tuple[tuple[int, int], ...]
    density: float = 0.1
    block: int = 64
    gates: tuple[str, ...]
    pages: tuple[int, ...]
    peers: tuple[str, ...]

    def __post_init__(self) -> None:
        self.among(peers=(self.peers, ("cudnn", "fa2")))
        self.shares((self.density,))
        self.counts(sizes=itertools.chain(*self.sizes), block=(self.block,), pages=self.pages)
        for size in (self.block, *self.pages):
            for _, tokens in self.sizes:
                if tokens % size:
                    raise ValueError(f"{tokens} tokens are no whole number of blocks or pages of {size}")
        super().__post_init__()
        for gate in self.gates:
            if gate != "quest":
                self.design(gate)

    def count(self, tokens: int) -> int:
        """Return how many of a sequence's blocks are read."""
        return max(1, round(self.density * tokens / self.block))

    def scorer(self, name: str) -> Scorer:
        """Return what a name of `gates` ranks by, for single tokens."""
        if name == "quest":
            return baselines.create("quest", block_size=(1, self.block))
        return self.made(self.design(name)).per_token()

    def design(self, name: str) -> GateConfig:
        """Return the design that ``default`` or ``sub<n>`` stands for.

        Raises:
            ValueError: If the name is none, or blocks cannot be divided so.
        """
        settings: dict[str, Any] = {"phase": "decode", "head_dim": self.head_dim}
        if sub := re.fullmatch(r"sub([1-9]\d*)", name):
            settings["k_sub_block"] = int(sub[1])
        elif name != "default":
            raise ValueError(
                f"gates must be default, sub<key tokens per summary>, e.g. sub16, or quest, got {name!r}"
            )
        return GateConfig(self.heads, self.kv_heads, block_size=self.block, **design_of(settings))


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

#: The same for decoding.
DECODE_DEFAULTS: dict[str, dict[str, Any]] = {
    device: {name: DEFAULTS[device][name] for name in ("heads", "kv_heads", "head_dim", "dtype")}
    | {"sizes": sizes, "gates": gates, "pages": pages}
    for device, sizes, gates, pages in (
        ("cpu", ((1, 4096), (1, 16384), (4, 16384)), ("default", "quest"), (64,)),
        (
            "cuda",
            ((1, 32 << 10), (1, 128 << 10), (8, 128 << 10), (16, 32 << 10), (16, 128 << 10), (64, 128 << 10)),
            ("default", "sub64", "quest"),
            (64, 256),
        ),
    )
}
