"""The gate: pools queries and keys per block and scores block pairs. One class for every phase.

B batch, H heads (Hq query, Hk key/value, G = Hq // Hk), T tokens, N blocks, D head dim, E gate dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from seerattention.gate_config import GateConfig as GateConfig
from seerattention.ops.language import power_of_two
from seerattention.ops.options import SummaryOptions
from seerattention.ops.score_blocks import score_blocks
from seerattention.ops.summarise_blocks import pool_blocks as pool_blocks
from seerattention.ops.summarise_blocks import project_blocks, rotate, summarise_blocks
from seerattention.rows import Rows
from seerattention.scorer import Scorer as Scorer
from seerattention.scorer import rounded

#: cos and sin of rotary positions: positions ``[B, N]`` -> two tensors ``[B, N, E]``.
Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]


class LengthRotary(functools.partial[tuple[Tensor, Tensor]]):
    """Rotary code whose angles depend on the text's length, not on positions alone: no table holds them."""


#: Angles of the first positions, by rotary code, device and how many, a power of two. All sizes are kept, at
#: most twice the largest: captured graphs read them.
_ANGLES: WeakKeyDictionary[Rotary, dict[tuple[torch.device, int], tuple[Tensor, Tensor]]] = (
    WeakKeyDictionary()
)


class Weight(nn.Module):
    """A weight that `summarise_blocks` takes: calling the module returns it.

    Read in a forward pass it is there also where others keep it elsewhere meanwhile, as offloading does.

    Args:
        shape: ``[H, in, out]`` of a matrix per head, ``[dim]`` of a norm.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        """Return the weight."""
        return self.weight


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
        if rotary is None:
            width = config.dim
            if config.rope_pairs == "slowest":
                width = max(width, config.head_dim)
            rotary = _plain_rotary(config.rope_theta, width, config.dim)
        self.rotary = rotary
        groups = config.num_heads // config.num_kv_heads
        q_heads, q_width = config.num_heads, len(config.q_pool) * config.head_dim
        if config.per_kv_head:
            q_heads, q_width = config.num_kv_heads, groups * q_width
        k_heads = config.num_kv_heads if config.q_proj else config.num_heads
        k_width = len(config.k_pool) * config.head_dim
        self.linear_q = Weight(q_heads, q_width, config.dim) if config.q_proj else None
        self.linear_k = Weight(k_heads, k_width, config.dim)
        self.norm_q = Weight(config.dim) if config.qk_norm else None
        self.norm_k = Weight(config.dim) if config.qk_norm else None
        # What `ProductScorer` asks for.
        self.sub_blocks = (config.block_size // config.q_sub, config.block_size // config.k_sub)
        self.scale = config.dim**-0.5
        self.shares = config.shares
        self.tokens_per_summary = config.k_sub
        self.reset_parameters()

    @property
    def score_dtype(self) -> torch.dtype | None:
        """What summaries are rounded to for blocks of queries; None for not at all."""
        name = self.config.score_dtype
        return None if name is None else getattr(torch, name)

    def reset_parameters(self) -> None:
        """Initialise the projections as ``config.init`` says, from torch's random generator."""
        c = self.config
        for norm in filter(None, (self.norm_q, self.norm_k)):
            nn.init.ones_(norm.weight)
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
        self.rotary = rotary

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate summaries ``[B, H, N, E]`` to ``positions`` (int64 ``[N]`` or ``[B, N]``)."""
        turns = self._turns(positions, x.shape[0])
        return x if turns is None else rotate(x, *turns)

    def _turns(self, positions: Tensor, batch: int) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of the rotation to ``positions``, or None where summaries are not rotated."""
        if not self.config.rope:
            return None
        return self.rotary(positions.expand(batch, -1))

    def angles(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return cosine and sine of the first positions, fp32 ``[tokens or more, E]``, kept for later calls.

        None where summaries are not rotated, or by angles that depend on the text's length.
        """
        if not self.config.rope or isinstance(self.rotary, LengthRotary):
            return None
        kept, room = _ANGLES.setdefault(self.rotary, {}), power_of_two(tokens)
        if (device, room) in kept:
            return kept[device, room]
        cos, sin = self.rotary(torch.arange(room, device=device)[None])
        made = cos[0].float().contiguous(), sin[0].float().contiguous()
        # What a graph makes while it is captured is there once it has run.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            kept[device, room] = made
        return made

    def compress(self, k: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Summarise keys: ``[B, Hk, T, D]`` -> ``[B, H, N * block_size / k_sub, E]``.

        ``H`` is ``Hk``, or ``Hq`` for a gate without q projection. See `ProductScorer.compress`.
        """
        return self._summarise(k, self.config.k_sub, self.config.k_pool, positions, rows, **self._of_keys())

    def summarise_queries(
        self, q: Tensor, *, positions: Tensor, rows: Rows | None = None, rounded_to: torch.dtype | None = None
    ) -> Tensor:
        """Summarise queries: ``[B, Hq, Tq, D]`` -> ``[B, H, Nq * block_size / q_sub, E]``."""
        return self._summarise_queries(q, self.config.q_sub, positions, rows, rounded_to)

    def _summarise_queries(
        self,
        q: Tensor,
        size: int,
        positions: Tensor,
        rows: Rows | None,
        rounded_to: torch.dtype | None = None,
    ) -> Tensor:
        """Summarise every ``size`` queries."""
        options = self._of_queries() | ({} if rounded_to is None else {"rounded_to": rounded_to})
        return self._summarise(q, size, self.config.q_pool, positions, rows, **options)

    def _of_keys(self) -> dict[str, Any]:
        """Return what projects and normalises the pools of keys."""
        return {"weight": self.linear_k(), "norm": None if self.norm_k is None else self.norm_k()}

    def _of_queries(self) -> dict[str, Any]:
        """Return what merges, projects and normalises the pools of queries."""
        c = self.config
        return {
            "weight": None if self.linear_q is None else self.linear_q(),
            "norm": None if self.norm_q is None else self.norm_q(),
            "merge": c.num_heads // c.num_kv_heads if c.per_kv_head else 1,
        }

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
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return project_blocks(summarise_blocks(x, size, pools, dtype=dtype, rows=rows), **options)

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Score all block pairs: fp32 ``[B, H, Nq, Nk]``, before softmax. See `Scorer.score`.

        Shares are of what a query may see: a query's position is then its place among the keys.
        """
        rows = Rows.at(int(positions[..., 0].max()), q.shape[2]) if self.shares else None
        return self.score_summaries(self.summarise_queries(q, positions=positions), k_blocks, rows=rows)

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
        options = {"scale": self.scale, "rows": rows, "block_size": self.block_size, "shares": self.shares}
        queries, keys = rounded(queries, self), rounded(keys.to(queries.dtype), self)
        return score_blocks(queries, keys, self.sub_blocks, **options)

    def per_token(self) -> TokenGate:
        """Return this gate for single query tokens; see `Scorer.per_token`."""
        return TokenGate(self)

    def forward(self, q_nope: Tensor, k_nope: Tensor, *, positions: Tensor | None = None) -> Tensor:
        """Score a whole sequence at once.

        Args:
            q_nope: ``[B, Hq, Tq, D]`` before the rotary embedding, the last of the ``Tk`` tokens.
            k_nope: ``[B, Hk, Tk, D]`` before the rotary embedding.
            positions: int64 ``[Tk]`` or ``[B, Tk]``; default 0, 1, 2, ...

        Returns:
            fp32 ``[B, H, Nq, Nk]``, before softmax; acausal pairs are not masked, or with shares 0. ``H`` is
            ``Hq``, or ``Hk`` with ``per_kv_head``.

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
        k_blocks, own = self.compress(k_nope, positions=positions), positions[..., rows.first :]
        if self.shares:
            return self.score_summaries(self.summarise_queries(q_nope, positions=own), k_blocks, rows=rows)
        return self.score(q_nope, k_blocks, positions=own)


class TokenGate:
    """A gate for single query tokens: its weights and its summaries of keys, a row for every query.

    Args:
        gate: The gate.

    Source: SeerAttention-R, section 3.1 (arXiv 2506.08889).
    """

    after_rope = False

    def __init__(self, gate: AttnGate) -> None:
        self.gate = gate
        self.block_size: tuple[int, int] = (1, gate.config.block_size)
        self.sub_blocks = (1, gate.sub_blocks[1])
        self.scale = gate.scale
        self.tokens_per_summary = gate.tokens_per_summary

    def compress(self, k: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Summarise keys as the gate does."""
        return self.gate.compress(k, positions=positions, rows=rows)

    def summarise_queries(self, q: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Summarise every query alone: ``[B, Hq, Tq, D]`` -> ``[B, H, Tq, E]``."""
        return self.gate._summarise_queries(q, 1, positions, rows)

    def summary_options(self, tokens: int, *, queries: bool) -> SummaryOptions | None:
        """Return how queries, or keys, are summarised, as data that a fused kernel runs.

        The angles are those of a sequence's first ``tokens`` positions or more, ``[tokens, E]``. None where
        these depend on the text's length.
        """
        gate, c = self.gate, self.gate.config
        options = gate._of_queries() if queries else gate._of_keys()
        if c.rope:
            options["rotary"] = gate.angles(tokens, gate.linear_k.weight.device)
            if options["rotary"] is None:
                return None
        size, pools = (1, c.q_pool) if queries else (c.k_sub, c.k_pool)
        return SummaryOptions(size=size, pools=pools, dtype=gate.linear_k.weight.dtype, **options)

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Score all blocks for every query: fp32 ``[B, H, Tq, Nk]``, before softmax. See `Scorer.score`."""
        queries = self.summarise_queries(q, positions=positions)
        return score_blocks(queries, k_blocks.to(queries.dtype), self.sub_blocks, scale=self.scale)

    def per_token(self) -> TokenGate:
        """Return itself."""
        return self


@functools.lru_cache
def _plain_rotary(theta: float, width: int, dim: int) -> Rotary:
    """Return plain RoPE of the slowest ``dim`` of ``width`` values; one function for gates of one design."""
    return functools.partial(_turned, theta, width, dim)


#: What positions are multiplied by, by its arguments; a graph is not captured while it is copied to a device.
_INVERSES: dict[tuple[float, int, int, torch.device], Tensor] = {}


# A function of the module: what gates rotate by is pickled with them.
def _turned(theta: float, width: int, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    key = theta, width, dim, positions.device
    inverse = None if torch.compiler.is_compiling() else _INVERSES.get(key)
    if inverse is None:
        # As models compute them, on the CPU and as inverses, which decides the last bit: angles of late
        # positions are many turns.
        inverse = 1 / theta ** (torch.arange(width - dim, width, 2, device="cpu") / width)
        inverse = inverse.to(positions.device, non_blocking=True)
        if not torch.compiler.is_compiling():
            _INVERSES[key] = inverse
    angle = positions[..., None].float() * inverse
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


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
