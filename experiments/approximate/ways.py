"""Cheaper ways to compute what gates choose by, emulated in PyTorch.

Exactly, the score of a pair of blocks takes a product of every query summary with every key summary: of each
query summary the largest in a KV block, its softmax over blocks, and of a query block's summaries the
largest. H heads, Nq and Nk blocks, Sq and Sk summaries, E numbers each; best products are laid out
``[H, Nk, Sq]``, which a CPU reduces fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from seerattention.gate import AttnGate
from seerattention.policies import TopK
from seerattention.rows import Rows

#: Query blocks that one tile of a tensor core's product holds: 64 rows of 16 summaries per block.
TILE = 4

#: Largest number of float8_e4m3fn, and how many products are added up before a sum is rounded to fp16.
LARGEST_FP8, SUMMED = 448.0, 16

#: Steps of a factor of 2 in which the Hopper kernel keeps scores.
STEPS = 512

#: Key summaries by query summaries, ``[Sk, E]`` and ``[Sq, E]``, to ``[Sk, Sq]``.
Product = Callable[[Tensor, Tensor], Tensor]


def in_fp32(keys: Tensor, queries: Tensor) -> Tensor:
    """Multiply as the specification does."""
    return keys @ queries.mT


def in_fp16(keys: Tensor, queries: Tensor) -> Tensor:
    """Multiply numbers in fp16, and round sums to fp16 after every few products."""
    keys, queries = keys.half().float(), queries.half().float()
    pairs = zip(keys.split(SUMMED, -1), queries.split(SUMMED, -1), strict=True)
    total = torch.zeros((), dtype=torch.float16)
    for k, q in pairs:
        total = (total.float() + k @ q.mT).half()
    return total.float()


def in_fp8(x: Tensor, *, per_head: bool) -> Tensor:
    """Round ``[H, S, E]`` to float8_e4m3fn, scaled so that the largest of a head, or of all, just fits."""
    most = x.abs().amax((-2, -1), keepdim=True) if per_head else x.abs().max()
    scale = LARGEST_FP8 / most.clamp_min(1e-30)
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


def plain_fp8(x: Tensor) -> Tensor:
    """Round to float8_e4m3fn without a scale, which nobody has to look for first."""
    return x.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).float()


def averaged(x: Tensor, count: int) -> Tensor:
    """Average every ``count`` summaries: ``[H, S, E]`` -> ``[H, S / count, E]``."""
    return x if count == 1 else x.unflatten(1, (-1, count)).mean(2)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's summaries of a whole prompt, and what is computed from them once.

    Attributes:
        queries: fp32 ``[H, Sq, E]``, a multiple of the summaries of a block.
        keys: fp32 ``[H, Sk, E]``, as many.
        sub_blocks: Summaries per query block and per KV block.
        scale: Factor of the products.
        tokens: Of the prompt.
        block_size: Tokens per (query block, KV block).
    """

    queries: Tensor
    keys: Tensor
    sub_blocks: tuple[int, int]
    scale: float
    tokens: int
    block_size: tuple[int, int]

    @classmethod
    def of(cls, gate: AttnGate, q: Tensor, k_blocks: Tensor, *, positions: Tensor) -> Layer:
        """Summarise the queries of one whole prompt, ``[1, Hq, T, D]``; ``k_blocks`` are its keys' summaries.

        Raises:
            ValueError: If the queries are not those of all keys.
        """
        tokens, config = q.shape[2], gate.config
        if q.shape[0] != 1 or k_blocks.shape[2] != -(-tokens // config.k_sub):
            raise ValueError(
                f"queries {list(q.shape)} and summaries {list(k_blocks.shape)} must be of one whole prompt"
            )
        queries, keys = gate.summarise_queries(q, positions=positions)[0].float(), k_blocks[0].float()
        keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], 0)
        sub_blocks = config.block_size // config.q_sub, config.block_size // config.k_sub
        # A short last block repeats its last summary, which no maximum notices.
        queries, keys = (_whole(x, subs) for x, subs in zip((queries, keys), sub_blocks, strict=True))
        return cls(queries, keys, sub_blocks, gate.scale, tokens, gate.block_size)

    @cached_property
    def rows(self) -> Rows:
        """The prompt's geometry."""
        return Rows.last(self.tokens, self.tokens)

    @cached_property
    def valid(self) -> Tensor:
        """Causally valid pairs, bool ``[Nq, Nk]``."""
        return self.rows.causal(self.block_size, "cpu")

    @cached_property
    def always(self) -> Tensor:
        """Pairs that are read whatever their scores: the own block and the first, bool ``[Nq, Nk]``."""
        return TopK(1.0, sink_blocks=1).always(self.rows.own(self.block_size, "cpu"), self.valid)

    def best(self, queries: Tensor, keys: Tensor, product: Product = in_fp32) -> Tensor:
        """Return the largest product of every query summary in every KV block, ``[H, Nk, Sq]``.

        Summaries may be averages of several. Those of keys that begin after a query summary's end are not
        seen, and -inf stands where none of a block is.
        """
        blocks, count = self.valid.shape[1], keys.shape[1] // self.valid.shape[1]
        begins = torch.arange(keys.shape[1]) * queries.shape[1]
        ends = torch.arange(1, queries.shape[1] + 1) * keys.shape[1]
        later, found = begins[:, None] >= ends, []
        for q, k in zip(queries, keys, strict=True):
            products = product(k, q).masked_fill_(later, float("-inf"))
            found.append(products.view(blocks, count, -1).amax(1))
        return torch.stack(found) * self.scale

    @cached_property
    def exact(self) -> Tensor:
        """The largest products, ``[H, Nk, Sq]``."""
        return self.best(self.queries, self.keys)

    @cached_property
    def totals(self) -> Tensor:
        """The logarithm of the sum of each query summary's exponentials over blocks, ``[H, 1, Sq]``."""
        return self.exact.logsumexp(1, keepdim=True)

    def shares(self, best: Tensor, totals: Tensor) -> Tensor:
        """Return the largest share of each query block's summaries, log, ``[H, Nq, Nk]``."""
        return (best - totals).unflatten(2, (self.valid.shape[0], -1)).amax(3).mT


def _whole(x: Tensor, subs: int) -> Tensor:
    return torch.cat([x, x[:, -1:].expand(-1, -x.shape[1] % subs, -1)], 1)


class Scored(NamedTuple):
    """What a way says of the pairs of blocks.

    Attributes:
        scores: fp32 ``[H, Nq, Nk]``; -inf where a pair was left out.
        products: Those computed, as a share of the exact way's.
    """

    scores: Tensor
    products: float


Way = Callable[[Layer], Scored]


def exact(layer: Layer) -> Scored:
    """Score as the specification does."""
    return Scored(layer.shares(layer.exact, layer.totals), 1.0)


def rounded(layer: Layer, to: Callable[[Tensor], Tensor]) -> Scored:
    """Round summaries before they are multiplied."""
    best = layer.best(to(layer.queries), to(layer.keys))
    return Scored(layer.shares(best, best.logsumexp(1, keepdim=True)), 1.0)


def bf16(x: Tensor) -> Tensor:
    """Round as gates on a GPU do, whose summaries are bfloat16."""
    return x.bfloat16().float()


def fp16_sums(layer: Layer) -> Scored:
    """Add up products in fp16."""
    best = layer.best(layer.queries, layer.keys, in_fp16)
    return Scored(layer.shares(best, best.logsumexp(1, keepdim=True)), 1.0)


def stored(layer: Layer, dtype: torch.dtype) -> Scored:
    """Write each query summary's largest products in 16 bits; their sums come before."""
    return Scored(layer.shares(layer.exact.to(dtype).float(), layer.totals), 1.0)


def stored_in_steps(layer: Layer) -> Scored:
    """Write them and their sums in steps of a part of a factor of 2, as the Hopper kernel does."""
    best, totals = ((x * (STEPS / math.log(2))).round() for x in (layer.exact, layer.totals))
    return Scored(layer.shares(best, totals), 1.0)


def coarse(
    layer: Layer, keys: int, queries: int, keep: float, *, together: bool, rest: bool = True
) -> Scored:
    """Keep the blocks with the best coarse shares, and score only those finely.

    Args:
        layer: The layer.
        keys: Key summaries per average.
        queries: Query summaries per average.
        keep: Share of the blocks to keep, as `TopK` counts it.
        together: Keep by the largest coarse share of a tile's query blocks; otherwise what any of them keeps.
        rest: Add what was left out to the totals, by its coarse products.
    """
    rough = layer.best(averaged(layer.queries, queries), averaged(layer.keys, keys))
    shares = layer.shares(rough, rough.logsumexp(1, keepdim=True))
    kept = keeping(layer, shares, keep, together=together)
    # [H, Nk, Sq] as the products are.
    of_summaries = kept.mT.repeat_interleave(layer.sub_blocks[0], 2)
    others = rough.repeat_interleave(queries, 2) if rest else torch.tensor(float("-inf"))
    totals = torch.where(of_summaries, layer.exact, others).logsumexp(1, keepdim=True)
    scores = layer.shares(layer.exact, totals).masked_fill(~kept, float("-inf"))
    share = float((kept & layer.valid).sum() / (len(kept) * layer.valid.sum()))
    return Scored(scores, share + 1 / (keys * queries))


def coarse_alone(layer: Layer, keys: int, queries: int) -> Scored:
    """Choose by coarse shares, and score nothing finely."""
    rough = layer.best(averaged(layer.queries, queries), averaged(layer.keys, keys))
    return Scored(layer.shares(rough, rough.logsumexp(1, keepdim=True)), 1 / (keys * queries))


def keeping(layer: Layer, shares: Tensor, keep: float, *, together: bool) -> Tensor:
    """Return the pairs that are kept, the same for the query blocks of a tile, bool ``[H, Nq, Nk]``."""
    rows = layer.valid.shape[0]
    rule = TopK(keep).rule(layer.valid.shape[1], layer.block_size[1])
    valid, always = (_tiles(x).any(1) for x in (layer.valid, layer.always))
    if together:
        masked = shares.masked_fill(~layer.valid, float("-inf"))
        of_tile = torch.stack([_tiles(one, float("-inf")).amax(1) for one in masked])
        taken = rule.choose(of_tile[None], valid, always)[0] | always
    else:
        own = rule.choose(shares[None], layer.valid, layer.always)[0] | layer.always
        taken = torch.stack([_tiles(one).any(1) for one in own])
    return taken.repeat_interleave(TILE, 1)[:, :rows] & layer.valid


def _tiles(x: Tensor, fill: float = 0) -> Tensor:
    """Return ``[Nq, Nk]`` as ``[tiles, TILE, Nk]``."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % TILE), value=fill).unflatten(0, (-1, TILE))


def totals_of_some(layer: Layer, every: int) -> Scored:
    """Estimate totals by every few key summaries of a block; products are exact."""
    totals = layer.best(layer.queries, layer.keys[:, ::every]).logsumexp(1, keepdim=True)
    return Scored(layer.shares(layer.exact, totals), 1 + 1 / every)


def totals_of_means(layer: Layer, count: int) -> Scored:
    """Estimate totals by averages of key summaries; products are exact."""
    totals = layer.best(layer.queries, averaged(layer.keys, count)).logsumexp(1, keepdim=True)
    return Scored(layer.shares(layer.exact, totals), 1 + 1 / count)


def totals_in_fp8(layer: Layer) -> Scored:
    """Compute totals by products of fp8 numbers; products that are compared are exact."""
    queries, keys = (in_fp8(x, per_head=False) for x in (layer.queries, layer.keys))
    totals = layer.best(queries, keys).logsumexp(1, keepdim=True)
    return Scored(layer.shares(layer.exact, totals), 2.0)


def no_totals(layer: Layer) -> Scored:
    """Compare products of different query summaries, which shares are there to avoid."""
    return Scored(layer.shares(layer.exact, torch.zeros(())), 1.0)


def bounded(layer: Layer, parts: int) -> Tensor:
    """Return what no score can exceed, by each part's mean and radius, ``[H, Nq, Nk]``.

    The product with a summary is at most that with its part's mean, and the query's length times the
    distance of the farthest. Totals are taken as known, which makes the bound better than a kernel's.

    Args:
        layer: The layer.
        parts: Of a KV block.
    """
    grouped = layer.keys.unflatten(1, (-1, layer.sub_blocks[1] // parts))
    means = grouped.mean(2)
    radii = (grouped - means[:, :, None]).norm(dim=-1).amax(-1)
    found = []
    for q, mean, radius in zip(layer.queries, means, radii, strict=True):
        most = mean @ q.mT + radius[:, None] * q.norm(dim=-1)
        found.append(most.view(layer.valid.shape[1], parts, -1).amax(1))
    return layer.shares(torch.stack(found) * layer.scale, layer.totals)


def ways() -> dict[str, Way]:
    """Return all ways by name, the exact one first."""
    named: dict[str, Way] = {
        "exact": exact,
        "bf16": partial(rounded, to=bf16),
        "fp8": partial(rounded, to=partial(in_fp8, per_head=False)),
        "fp8 per head": partial(rounded, to=partial(in_fp8, per_head=True)),
        "fp8 unscaled": partial(rounded, to=plain_fp8),
        "fp16 sums": fp16_sums,
        "stored as fp16": partial(stored, dtype=torch.float16),
        "stored as bf16": partial(stored, dtype=torch.bfloat16),
        "stored in steps": stored_in_steps,
    }
    for keys in (4, 16):
        for queries in (1, 4):
            named[f"coarse {keys}x{queries} alone"] = partial(coarse_alone, keys=keys, queries=queries)
            for together in (True, False):
                for keep in (0.2, 0.3, 0.4):
                    name = f"coarse {keys}x{queries}, {'largest' if together else 'any'}, {keep:.0%}"
                    named[name] = partial(coarse, keys=keys, queries=queries, keep=keep, together=together)
    named["coarse 4x1, largest, 30%, no rest"] = partial(
        coarse, keys=4, queries=1, keep=0.3, together=True, rest=False
    )
    for every in (4, 8, 16):
        named[f"totals of 1/{every}"] = partial(totals_of_some, every=every)
    for count in (4, 16):
        named[f"totals of means of {count}"] = partial(totals_of_means, count=count)
    named["totals in fp8"] = totals_in_fp8
    named["no totals"] = no_totals
    return named
