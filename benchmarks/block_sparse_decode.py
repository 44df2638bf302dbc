"""Time a step of sparse decoding on a GPU, with choosing and without, beside dense decoding.

python benchmarks/block_sparse_decode.py --out benchmarks/results/<device>/block_sparse_decode.json

One layer of Llama-3.1-8B, bf16, blocks of 64 per KV head, every step a CUDA graph of many. Dense is cuDNN and
FlashAttention-2 through PyTorch; the faster one counts.
Choosing is a gate's with a score per KV head, its keys' sub-blocks of so many tokens and summaries of so many
numbers. ``--sizes`` are pairs BATCHxTOKENS; ``--pages`` times a cache of pages of as many tokens as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from script import kernel_parser, launches, override, sweep, times, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seerattention.gate import AttnGate, GateConfig
from seerattention.measure.timing import interleaved
from seerattention.ops.block_sparse_decode import block_sparse_decode, triton
from seerattention.ops.launch import Launch
from seerattention.ops.select_decode_blocks import select_decode_blocks
from seerattention.ops.select_decode_blocks import triton as choosing
from seerattention.ops.update_summaries import triton as updating
from seerattention.ops.update_summaries import update_summaries
from seerattention.policies import TokenBudget
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 64
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SIZES = ["1x32768", "1x131072", "8x131072", "16x32768", "16x131072", "64x131072"]
#: Gates that choose: tokens per summary of keys, and its numbers. The first is the default for decoding.
DESIGNS = [(sub, dim) for sub in (64, 32, 16) for dim in (96, 128)]


def selection_of(batch: int, tokens: int, density: float) -> BlockSelection:
    """Draw as many blocks for every KV head as the density asks for, the last one among them."""
    blocks = num_blocks(tokens, BLOCK)
    count = max(1, round(density * blocks))
    draws = torch.rand(batch, KV_HEADS, 1, blocks, device="cuda")
    draws[..., -1] = 2
    mask = torch.zeros_like(draws, dtype=torch.bool)
    mask.scatter_(-1, draws.topk(count).indices, True)
    return BlockSelection.from_mask(mask, (1, BLOCK))


def dense(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to the whole cache; a step of one token needs no mask."""
    if name != "cudnn":
        # A group's query heads as the rows of one query block.
        q = q.view(len(q), KV_HEADS, -1, DIM)
    with sdpa_kernel(DENSE[name]):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > KV_HEADS)


def choosing_by(
    sub: int, dim: int, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, density: float
) -> dict[str, Callable[[], object]]:
    """Return choosing, a step of choosing and attention, and updates of summaries, by name."""
    batch, _, tokens, _ = k.shape
    sizes = {"gate_dim": dim, "per_kv_head": True, "q_sub_block": 1, "k_sub_block": sub}
    gate = AttnGate(GateConfig(HEADS, KV_HEADS, DIM, BLOCK, **sizes)).to(q.device, q.dtype)
    scorer, budget = gate.requires_grad_(False).per_token(), TokenBudget(round(density * tokens))
    summaries, tail, new = (
        torch.randn(batch, KV_HEADS, *shape, device=q.device, dtype=q.dtype)
        for shape in ((tokens // sub, dim), (BLOCK, DIM), (1, DIM))
    )
    asked = {"lengths": lengths, "num_keys": tokens, "kv_heads": KV_HEADS, "backend": "triton"}

    def choose() -> BlockSelection:
        return select_decode_blocks(q, summaries, scorer, budget, **asked)

    def step() -> object:
        return block_sparse_decode(q, k, v, choose(), lengths=lengths, backend="triton")

    update = partial(update_summaries, summaries, tail, new, scorer, backend="triton")
    return {
        "choosing": choose,
        "step": step,
        "update": partial(update, lengths=lengths - 1),
        "update that finishes": partial(update, lengths=lengths),
    }


def main() -> None:
    """Run the benchmark."""
    options = kernel_parser(__doc__, [])
    options.add_argument("--sizes", nargs="+", default=SIZES, help="BATCHxTOKENS (default: %(default)s)")
    options.add_argument("--density", type=float, default=0.1, help="share of blocks that are read")
    options.add_argument(
        "--pages", type=int, nargs="*", default=[64, 256], help="tokens (default: %(default)s)"
    )
    args = options.parse_args()
    dtype = getattr(torch, args.dtype)
    place = (triton.LAUNCHES, (dtype.itemsize, DIM))
    constants = {name: [(triton.__dict__, name)] for name in ("MOST_SPLITS", "MOST_WORDS")}
    constants["SCORES_PER_WARP"] = [(choosing.__dict__, "SCORES_PER_WARP")]
    tables = {"queries": choosing, "scores": choosing, "launch": updating}
    override(constants | {name: [(x.__dict__, name.upper())] for name, x in tables.items()}, args.set)
    rows: list[dict[str, Any]] = []
    with_choosing: list[dict[str, Any]] = []
    for size in args.sizes:
        batch, tokens = (int(n) for n in size.split("x"))
        q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=dtype)
        k, v = (torch.randn(batch, KV_HEADS, tokens, DIM, device="cuda", dtype=dtype) for _ in range(2))
        selection = selection_of(batch, tokens, args.density)
        lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
        sparse = partial(block_sparse_decode, q, k, v, selection, lengths=lengths, backend="triton")
        if args.sweep:
            settings = product((64,), (2, 4, 8), (2, 3, 4, 5), (1, 2, 3, 4, 6))
            tried = [(Launch(16, *setting),) for setting in settings]
            sweep(size, [place], tried, sparse)
            continue
        variants: dict[str, Callable[[], object]] = {"sparse": sparse}
        variants |= {n: partial(dense, n, q, k, v) for n in DENSE}
        for page in args.pages:
            table = torch.randperm(batch * tokens // page, device="cuda").to(torch.int32).view(batch, -1)
            shape = (-1, KV_HEADS, page, DIM)
            variants[f"pages of {page}"] = partial(
                block_sparse_decode, q, k.view(shape), v.view(shape), selection, lengths=lengths, pages=table,
                backend="triton",
            )  # fmt: skip
        attention = list(variants)
        for design in DESIGNS:
            made = choosing_by(*design, q, k, v, lengths, args.density)
            variants |= {f"{name} {design}": run for name, run in made.items()}
        seconds = interleaved(variants, repeats=args.repeats, device="cuda")
        best = min(min(seconds[name]) for name in DENSE)
        read = int(selection.counts.sum()) * BLOCK * DIM * 2 * dtype.itemsize
        for name in attention:
            row = {"size": size, "variant": name} | times(seconds[name], 4)
            row["x_dense"] = round(best * 1e3 / row["ms"], 2)
            row["TB_s"] = round((k.nbytes + v.nbytes if name in DENSE else read) / row["ms"] / 1e9, 2)
            rows.append(row)
            print(*row.values(), flush=True)
        for design in DESIGNS:
            row = {"size": size, "tokens_per_summary": design[0], "dim": design[1]}
            row |= {f"{name} us": round(median(seconds[f"{name} {design}"]) * 1e6, 2) for name in made}
            with_choosing.append(row | {"x_dense": round(best * 1e6 / row["step us"], 2)})
        del k, v, variants, sparse, made
    for row in with_choosing:
        print("; ".join(f"{name} {value}" for name, value in row.items()))
    table = {f"{key} {i}": each for key, some in triton.LAUNCHES.items() for i, each in enumerate(some)}
    write(
        args.out, rows, density=args.density, dtype=args.dtype, choosing=with_choosing,
        launches=launches({"decode": table}),
    )  # fmt: skip


if __name__ == "__main__":
    main()
