"""Time a step of sparse decoding on a GPU beside dense decoding.

python benchmarks/block_sparse_decode.py --out benchmarks/results/<device>/block_sparse_decode.json

One layer of Llama-3.1-8B, bf16, blocks of 64 per KV head, every step a CUDA graph of many. Dense is cuDNN and
FlashAttention-2 through PyTorch; the faster one counts.
``--sizes`` are pairs BATCHxTOKENS; ``--pages`` times a cache of pages of as many tokens as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from script import kernel_parser, launches, override, sweep, times, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seerattention.measure.timing import interleaved
from seerattention.ops.block_sparse_decode import block_sparse_decode, triton
from seerattention.ops.launch import Launch
from seerattention.rows import num_blocks
from seerattention.selection import BlockSelection

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 64
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SIZES = ["1x32768", "1x131072", "8x131072", "16x32768", "16x131072", "64x131072"]


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
    override({name: [(triton.__dict__, name)] for name in ("MOST_SPLITS", "MOST_WORDS")}, args.set)
    rows: list[dict[str, Any]] = []
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
        seconds = interleaved(variants, repeats=args.repeats, device="cuda")
        best = min(min(seconds[name]) for name in DENSE)
        read = int(selection.counts.sum()) * BLOCK * DIM * 2 * dtype.itemsize
        for name, found in seconds.items():
            row = {"size": size, "variant": name} | times(found, 4)
            row["x_dense"] = round(best * 1e3 / row["ms"], 2)
            row["TB_s"] = round((k.nbytes + v.nbytes if name in DENSE else read) / row["ms"] / 1e9, 2)
            rows.append(row)
            print(*row.values(), flush=True)
        del k, v, variants, sparse
    made = {f"{key} {i}": each for key, some in triton.LAUNCHES.items() for i, each in enumerate(some)}
    write(args.out, rows, density=args.density, dtype=args.dtype, launches=launches({"decode": made}))


if __name__ == "__main__":
    main()
