"""The gate: pools queries and keys per block and scores block pairs. One class for every phase.

B batch, H heads (Hq query, Hk key/value, G = Hq // Hk), T tokens, N blocks, D head dim, E gate dim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

from seerattention.ops.score_blocks import score_blocks
from seerattention.ops.summarise_blocks import pool_blocks as pool_blocks
from seerattention.ops.summarise_blocks import project_blocks, rotate, summarise_blocks
from seerattention.rows import Rows
from seerattention.scorer import Scorer as Scorer
from seerattention.settings import typed

#: cos and sin of rotary positions: positions ``[B, N]`` -> two tensors ``[B, N, E]``.
Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]

POOLS = ("max", "min", "avg")

#: Of everything that is counted in a gate's design: what a file asks for beyond is no design.
MOST = 1 << 16


@dataclass(frozen=True)
class GateConfig:
    """Everything that defines a gate's weights; saved beside them.

    The defaults are the design of docs/method.md that reads most of what matters within 3 % of dense
    attention's products; `published` gives the one of the paper.

    Attributes:
        num_heads: Query heads, ``Hq``.
        num_kv_heads: KV heads, ``Hk``.
        head_dim: Dimension of a head, ``D``.
        block_size: Tokens per block, of queries and keys.
        gate_dim: Dimension ``E`` of the projected summaries; default three quarters of ``head_dim``, in
            steps of 16, or ``head_dim`` where queries are not projected or summaries not rotated.
        q_pool: How a block of queries is summarised: any of max, min, avg, concatenated in order.
        k_pool: The same for keys.
        q_sub_block: Tokens per summary of queries; default one summary per block. With several, a
            block pair's score is the maximum over its pairs of sub-blocks.
        k_sub_block: The same for keys.
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
    per_kv_head: bool = False
    rope: bool = True
    rope_pairs: Literal["slowest", "spread"] = "slowest"
    rope_theta: float = 10000.0
    qk_norm: bool = False
    q_proj: bool = True
    init: Literal["identity", "random"] = "identity"

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
            narrow = max(16, round(0.75 * self.head_dim / 16) * 16)
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
        if self.init not in ("identity", "random"):
            raise ValueError(f"init must be 'identity' or 'random', got {self.init!r}")

    @property
    def dim(self) -> int:
        """Gate dimension ``E``."""
        assert self.gate_dim is not None
        return self.gate_dim

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


class HeadLinear(nn.Module):
    """The matrix of a linear layer without bias per head; `summarise_blocks` multiplies by it.

    Attributes:
        weight: ``[H, in, out]``.
    """

    def __init__(self, heads: int, width: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, dim))


class AttnGate(nn.Module):
    """Scores every (query block, KV block) pair from q and k before the rotary embedding.

    Args:
        config: The gate's design.
        rotary: The model's own rotary code for ``gate_dim``; default plain RoPE with
            ``config.rope_theta``.

    Source: SeerAttention, section 3.1 (arXiv 2410.13276); sub-blocks and the identity start are this
        project's (docs/method.md).
    """

    after_rope = False

    def __init__(self, config: GateConfig, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.config = config
        self.block_size = (config.block_size, config.block_size)
        self._rotary = rotary
        groups = config.num_heads // config.num_kv_heads
        q_heads, q_width = config.num_heads, len(config.q_pool) * config.head_dim
        if config.per_kv_head:
            q_heads, q_width = config.num_kv_heads, groups * q_width
        k_heads = config.num_kv_heads if config.q_proj else config.num_heads
        k_width = len(config.k_pool) * config.head_dim
        self.linear_q = HeadLinear(q_heads, q_width, config.dim) if config.q_proj else None
        self.linear_k = HeadLinear(k_heads, k_width, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=1e-6) if config.qk_norm else None
        self.norm_k = nn.RMSNorm(config.dim, eps=1e-6) if config.qk_norm else None
        # What `ProductScorer` asks for.
        self.sub_blocks = (config.block_size // config.q_sub, config.block_size // config.k_sub)
        self.scale = config.dim**-0.5
        self.tokens_per_summary = config.k_sub
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as ``config.init`` says, from torch's random generator."""
        c = self.config
        if c.init == "random":
            for linear in filter(None, (self.linear_q, self.linear_k)):
                nn.init.normal_(linear.weight, std=0.02)
            return
        groups = c.num_heads // c.num_kv_heads if c.per_kv_head else 1
        pairs = c.rope_pairs if c.rope else None
        _identity_(self.linear_k.weight, c.k_pool, c.head_dim, 1, pairs)
        if self.linear_q is not None:
            _identity_(self.linear_q.weight, c.q_pool, c.head_dim, groups, pairs)

    def use_rotary(self, rotary: Rotary) -> None:
        """Rotate with this code from now on, e.g. the model's own with its RoPE scaling."""
        self._rotary = rotary

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate summaries ``[B, H, N, E]`` to ``positions`` (int64 ``[N]`` or ``[B, N]``)."""
        turns = self._turns(positions, x.shape[0])
        return x if turns is None else rotate(x, *turns)

    def _turns(self, positions: Tensor, batch: int) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of the rotation to ``positions``, or None where summaries are not rotated."""
        if not self.config.rope:
            return None
        return (self._rotary or self._plain_rotary)(positions.expand(batch, -1))

    def _plain_rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        width = max(c.dim, c.head_dim) if c.rope_pairs == "slowest" else c.dim
        exponent = torch.arange(width - c.dim, width, 2, device=positions.device) / width
        angle = positions[..., None].float() * c.rope_theta**-exponent
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    def compress(self, k: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Summarise keys: ``[B, Hk, T, D]`` -> ``[B, H, N * block_size / k_sub, E]``.

        ``H`` is ``Hk``, or ``Hq`` for a gate without q projection. See `ProductScorer.compress`.
        """
        c = self.config
        options = {"weight": self.linear_k.weight} | _norm(self.norm_k)
        return self._summarise(k, c.k_sub, c.k_pool, positions, rows, **options)

    def summarise_queries(self, q: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Summarise queries: ``[B, Hq, Tq, D]`` -> ``[B, H, Nq * block_size / q_sub, E]``."""
        c = self.config
        options = {
            "weight": None if self.linear_q is None else self.linear_q.weight,
            "merge": c.num_heads // c.num_kv_heads if c.per_kv_head else 1,
        } | _norm(self.norm_q)
        return self._summarise(q, c.q_sub, c.q_pool, positions, rows, **options)

    def _summarise(
        self,
        x: Tensor,
        size: int,
        pools: tuple[str, ...],
        positions: Tensor,
        rows: Rows | None,
        **options: Any,
    ) -> Tensor:
        first: slice | Tensor = slice(None, None, size)
        if rows is not None and rows.is_packed:
            first = rows.edges(x.shape[2], size, x.device)[0]
        options["rotary"] = self._turns(positions[..., first], x.shape[0])
        dtype, device = self.linear_k.weight.dtype, x.device.type
        if not (torch.is_grad_enabled() and self.linear_k.weight.requires_grad):
            return summarise_blocks(x, size, pools, dtype=dtype, rows=rows, **options)
        # Tokens get no gradient while a gate learns: their pools are constants, made in one read, and
        # in what the projection will multiply.
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return project_blocks(summarise_blocks(x, size, pools, dtype=dtype, rows=rows), **options)

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Score all block pairs: fp32 ``[B, H, Nq, Nk]``, before softmax. See `Scorer.score`."""
        return self.score_summaries(self.summarise_queries(q, positions=positions), k_blocks)

    def score_summaries(self, queries: Tensor, keys: Tensor, *, rows: Rows | None = None) -> Tensor:
        """Score block pairs from the summaries of their queries and keys.

        Args:
            queries: From `summarise_queries`.
            keys: From `compress`; of packed sequences as ``Rows.rectangle`` lays them out.
            rows: Where the queries lie among the keys: pairs that no query of the block may see are not
                scored, they hold finite numbers without a meaning. Default every pair.

        Returns:
            fp32 ``[B, H, Nq, Nk]``, before softmax.
        """
        keys, size = keys.to(queries.dtype), self.block_size
        return score_blocks(queries, keys, self.sub_blocks, scale=self.scale, rows=rows, block_size=size)

    def forward(self, q_nope: Tensor, k_nope: Tensor, *, positions: Tensor | None = None) -> Tensor:
        """Score a whole sequence at once.

        Args:
            q_nope: ``[B, Hq, Tq, D]`` before the rotary embedding, the last of the ``Tk`` tokens.
            k_nope: ``[B, Hk, Tk, D]`` before the rotary embedding.
            positions: int64 ``[Tk]`` or ``[B, Tk]``; default 0, 1, 2, ...

        Returns:
            fp32 ``[B, H, Nq, Nk]``, before softmax; acausal pairs are not masked. ``H`` is ``Hq``,
            or ``Hk`` with ``per_kv_head``.

        Raises:
            ValueError: If q or k do not have the heads and the dimension of the configuration, or there are
                more queries than keys.
        """
        c = self.config
        for name, x, heads in (("q_nope", q_nope, c.num_heads), ("k_nope", k_nope, c.num_kv_heads)):
            if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != c.head_dim or not x.shape[2]:
                raise ValueError(f"{name} must be [B, {heads}, T >= 1, {c.head_dim}], got {list(x.shape)}")
        rows = Rows.last(q_nope.shape[2], k_nope.shape[2])
        if positions is None:
            positions = torch.arange(rows.num_keys, device=k_nope.device)
        k_blocks = self.compress(k_nope, positions=positions)
        return self.score(q_nope, k_blocks, positions=positions[..., rows.first :])


def _norm(norm: nn.RMSNorm | None) -> dict[str, Any]:
    return {} if norm is None else {"norm": norm.weight, "eps": norm.eps}


def _identity_(weight: Tensor, pools: tuple[str, ...], head_dim: int, copies: int, pairs: str | None) -> None:
    """Fill ``[H, copies * len(pools) * D, E]`` so that it passes the mean of the inputs, plus noise.

    The mean is the avg pool where there is one, else the average of the pools there are. Where ``E`` is
    less than ``D``, pairs of values that are rotated together are passed or left out together: the slowest
    are passed, or every ``D / E``-th. ``pairs`` is ``GateConfig.rope_pairs``, None without rotation.
    """
    dim = weight.shape[2]
    share = [float(p == "avg") if "avg" in pools else 1 / len(pools) for p in pools]
    eye = torch.eye(head_dim, dim)
    if pairs is not None and dim < head_dim:
        pair = torch.arange(dim // 2)
        pair = pair + (head_dim - dim) // 2 if pairs == "slowest" else pair * head_dim // dim
        eye = torch.eye(head_dim)[:, torch.cat((pair, pair + head_dim // 2))]
    block = torch.cat([s * eye for s in share] * copies) / copies
    with torch.no_grad():
        weight.normal_(std=0.01).add_(block.to(weight))
