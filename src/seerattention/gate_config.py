"""The design of gates: what `seerattention distill` sets by ``gate.``, and what is saved beside weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_type_hints

from seerattention.settings import typed

POOLS = ("max", "min", "avg")

#: What gates that choose for single queries alone are by default: one selection per KV head.
DECODE_DESIGN: dict[str, Any] = {"phase": "decode", "q_pool": ("avg",), "q_sub_block": 1, "per_kv_head": True}

#: And a summary of a few numbers per key: of what a step may read, that finds most (docs/method.md).
TOKEN_KEYS: dict[str, Any] = {"k_pool": ("avg",), "k_sub_block": 1, "gate_dim": 16}


def design_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of new gates, fields of `GateConfig`, with what gates of their phase have by default.

    Gates that choose for blocks of queries compare shares. Those for decoding have `TOKEN_KEYS` unless
    ``k_sub_block`` is given, no wider than a head.
    """
    if settings.get("phase") != "decode":
        return {"shares": True, **settings}
    if "k_sub_block" in settings:
        return {**DECODE_DESIGN, **settings}
    widest = TOKEN_KEYS["gate_dim"]
    return {
        **DECODE_DESIGN,
        **TOKEN_KEYS,
        "gate_dim": min(widest, settings.get("head_dim", widest)),
        **settings,
    }


#: Of everything that is counted in a gate's design: what a file asks for beyond is no design.
MOST = 1 << 16


@dataclass(frozen=True)
class GateConfig:
    """Everything that defines a gate's weights; saved beside them.

    The defaults are the design of docs/method.md that reads most of what matters within 3 % of dense
    attention's products, but for what `design_of` adds to new gates; `published` gives the one of the paper.

    Attributes:
        num_heads: Query heads, ``Hq``.
        num_kv_heads: KV heads, ``Hk``.
        head_dim: Dimension of a head, ``D``.
        block_size: Tokens per block, of queries and keys.
        gate_dim: Dimension ``E`` of the projected summaries; default three quarters of ``head_dim``, half
            of it where shares are compared, in steps of 16; or ``head_dim`` where queries are not projected
            or summaries not rotated.
        q_pool: How a block of queries is summarised: any of max, min, avg, concatenated in order.
        k_pool: The same for keys.
        q_sub_block: Tokens per summary of queries; default one summary per block. With several, a
            block pair's score is the largest of its summaries.
        k_sub_block: The same for keys.
        shares: A pair's score is the logarithm of the largest share of attention that a summary of its
            queries gives the KV block: of every query summary, the softmax over blocks of its largest
            product in each. Without, it is the largest product. New gates for prefill and both have it; for
            single queries both rank alike.
        score_dtype: What summaries of blocks of queries, and of keys, are rounded to before they are
            multiplied; default not at all. With ``float8_e4m3fn`` Hopper GPUs multiply twice as fast; what
            it changes is in docs/kernels.md. Gates are taught without.
        per_kv_head: One score per KV head, the group's queries merged by the projection, instead of
            one per query head.
        rope: Rotate the summaries to the position of their first token.
        rope_pairs: Which rotations summaries of ``gate_dim < head_dim`` get: ``slowest`` are those of the
            head's slowest pairs of values, whose content the projection starts by passing; ``spread`` are
            those of a head of ``gate_dim``, as the published code has it.
        rope_theta: Base of the rotation where the model's own rotary code is not at hand.
        qk_norm: RMS-normalise the projected summaries.
        q_proj: Project queries. Without, queries are used as pooled and keys are projected once per
            query head.
        init: ``identity`` starts as the plain dot product of mean-pooled q and k; ``random`` as the
            published code does, normal with standard deviation 0.02.
        phase: What the gate is taught to choose for: blocks of queries, ``prefill``; single queries,
            ``decode``; or ``both``, from one set of key summaries. New gates for decoding alone have
            defaults of their own: q_pool avg, q_sub_block 1 and per_kv_head; and k_pool avg, k_sub_block 1
            and gate_dim 16 where k_sub_block is not given.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 64
    gate_dim: int | None = None
    q_pool: tuple[str, ...] = ("max", "min", "avg")
    k_pool: tuple[str, ...] = ("max", "min", "avg")
    q_sub_block: int | None = 4
    k_sub_block: int | None = 4
    shares: bool = False
    score_dtype: Literal["float8_e4m3fn"] | None = None
    per_kv_head: bool = False
    rope: bool = True
    rope_pairs: Literal["slowest", "spread"] = "slowest"
    rope_theta: float = 10000.0
    qk_norm: bool = False
    q_proj: bool = True
    init: Literal["identity", "random"] = "identity"
    phase: Literal["prefill", "decode", "both"] = "prefill"

    def __post_init__(self) -> None:
        # JSON gives lists; keep the configuration hashable.
        object.__setattr__(self, "q_pool", tuple(self.q_pool))
        object.__setattr__(self, "k_pool", tuple(self.k_pool))
        optional = ("gate_dim", "q_sub_block", "k_sub_block")
        for name in ("num_heads", "num_kv_heads", "head_dim", "block_size", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
            if value > MOST:
                raise ValueError(f"{name} must be at most {MOST:,}, got {value}")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be a number above 0, got {self.rope_theta}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.gate_dim is None:
            part = 0.5 if self.shares else 0.75
            narrow = max(16, round(part * self.head_dim / 16) * 16)
            narrower = self.q_proj and self.rope and narrow < self.head_dim
            object.__setattr__(self, "gate_dim", narrow if narrower else self.head_dim)
        for name in ("q_pool", "k_pool"):
            pools = getattr(self, name)
            if not pools or len(set(pools)) != len(pools) or not set(pools) <= set(POOLS):
                raise ValueError(f"{name} must name some of {POOLS}, each once, got {pools}")
        for name in ("q_sub", "k_sub"):
            if self.block_size % getattr(self, name):
                raise ValueError(
                    f"{name}_block={getattr(self, name)} must divide block_size={self.block_size}"
                )
        if self.rope and self.dim % 2:
            raise ValueError(f"rotary positions need an even gate_dim, got {self.dim}")
        if self.rope_pairs not in ("slowest", "spread"):
            raise ValueError(f"rope_pairs must be 'slowest' or 'spread', got {self.rope_pairs!r}")
        if not self.q_proj and (len(self.q_pool) > 1 or self.dim != self.head_dim):
            raise ValueError(
                "without q_proj the gate needs one q pool and gate_dim == head_dim, got "
                f"q_pool={self.q_pool}, gate_dim={self.dim}, head_dim={self.head_dim}"
            )
        if self.per_kv_head and not self.q_proj:
            raise ValueError("per_kv_head merges a group's queries by q_proj; set q_proj=True")
        if self.score_dtype not in (None, "float8_e4m3fn"):
            raise ValueError(f"score_dtype must be 'float8_e4m3fn', or left out, got {self.score_dtype!r}")
        if self.score_dtype and self.phase == "decode":
            raise ValueError("score_dtype is for blocks of queries; gates of phase 'decode' score none")
        if self.init not in ("identity", "random"):
            raise ValueError(f"init must be 'identity' or 'random', got {self.init!r}")
        if self.phase not in ("prefill", "decode", "both"):
            raise ValueError(f"phase must be 'prefill', 'decode' or 'both', got {self.phase!r}")

    @property
    def dim(self) -> int:
        """Gate dimension ``E``."""
        assert self.gate_dim is not None
        return self.gate_dim

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of `phase`, one by one."""
        return ("prefill", "decode") if self.phase == "both" else (self.phase,)

    @property
    def q_sub(self) -> int:
        """Tokens per query summary."""
        return self.block_size if self.q_sub_block is None else self.q_sub_block

    @property
    def k_sub(self) -> int:
        """Tokens per key summary."""
        return self.block_size if self.k_sub_block is None else self.k_sub_block

    @classmethod
    def published(
        cls,
        gate_type: str = "Qavg_Kmaxminavg",
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int = 64,
        gate_dim: int | None = None,
        force_double: bool = False,
        rope_theta: float = 10000.0,
    ) -> GateConfig:
        """Return the configuration of a published prefill gate.

        Args:
            gate_type: ``Q`` and ``K`` each followed by pools in the order max, min, avg.
            num_heads: Query heads.
            num_kv_heads: KV heads.
            head_dim: Dimension of a head.
            block_size: Tokens per block.
            gate_dim: ``seerattn_gate_hidden_size``; default ``head_dim``.
            force_double: Project queries even where one pool of the right size makes it optional.
            rope_theta: Base of the rotation.

        Raises:
            ValueError: If the type cannot be read.

        Source: the published code, microsoft/SeerAttention at aba03e3.
        """
        parts = re.fullmatch(r"Q((?:max)?(?:min)?(?:avg)?)_K((?:max)?(?:min)?(?:avg)?)", gate_type)
        if not parts or not all(parts.groups()):
            raise ValueError(
                f"unknown gate type {gate_type!r}; write Q and K each followed by some of max, min, "
                "avg in this order, e.g. 'Qavg_Kmaxminavg'"
            )
        q_pool, k_pool = (tuple(re.findall("max|min|avg", part)) for part in parts.groups())
        double = force_double or len(q_pool) > 1 or gate_dim not in (None, head_dim)
        return cls(
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            gate_dim or head_dim,
            q_pool,
            k_pool,
            q_sub_block=None,
            k_sub_block=None,
            q_proj=double,
            rope_pairs="spread",
            rope_theta=rope_theta,
            init="random",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GateConfig:
        """Read a configuration back.

        Raises:
            ValueError: If a setting is unknown or of another type, or one without default is missing.
        """
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown gate settings {unknown}; known are {sorted(known)}")
        required = {"num_heads", "num_kv_heads", "head_dim"}
        if missing := sorted(required - set(values)):
            raise ValueError(f"gate settings are missing {missing}")
        hints = get_type_hints(cls)
        return cls(**{name: typed(name, value, hints[name]) for name, value in values.items()})
