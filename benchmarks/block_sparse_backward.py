"""Time forward and backward of block-sparse attention on a GPU, beside dense attention's in the same run.

python benchmarks/block_sparse_backward.py --out benchmarks/results/<device>/block_sparse_backward.json
python benchmarks/block_sparse_backward.py --tokens 32768 --sweep
python benchmarks/block_sparse_backward.py --tokens 32768 --set keys.stages=3 queries.block_n=32
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from script import kernel_parser, launches, override, sweep, times, write
from torch import Tensor

from seerattention import BlockSelection, block_sparse_attention
from seerattention.bench import peers
from seerattention.measure.timing import interleaved, peak_mb
from seerattention.ops.block_sparse_attention import BACKENDS, ORDER
from seerattention.ops.block_sparse_attention.kernels import backward, hopper_backward
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.ops.launch import Launch
from seerattention.ops.options import Options
from seerattention.ops.shapes import Shape
from seerattention.selection import causal_blocks
from seerattention.testing.gradients import by_name, check_gradients
from seerattention.testing.inputs import random_qkv, random_selection

#: Causal attention by cuDNN.
dense = partial(peers.dense, peers.DENSE["cudnn"])

#: Tried by ``--sweep``. Each takes seconds to compile; registers and shared memory: docs/kernels.md.
SWEEP = {
    "queries": [
        Launch(64, 64, 4, 2, 2),
        Launch(64, 64, 4, 2, 2, tma=False),
        Launch(64, 64, 4, 3, 1),
        Launch(64, 32, 4, 3, 2),
        Launch(64, 32, 4, 4, 2),
        Launch(64, 64, 8, 2, 2, 128),
    ],
    "keys": [
        Launch(64, 64, 4, 2, 2, 255),
        Launch(64, 64, 4, 2, 2, 255, tma=False),
        Launch(64, 64, 4, 3, 1, 255),
        Launch(32, 64, 4, 2, 2, 255),
        Launch(32, 64, 4, 3, 2, 255),
        Launch(32, 64, 4, 4, 2, 255),
        Launch(64, 64, 8, 2, 1, 255),
        Launch(64, 64, 8, 3, 1, 255),
    ],
}
#: Where a part's launches stand; the first is what runs with TMA.
TABLES = {"queries": (backward.QUERIES,), "keys": (backward.KEYS, backward.KEYS_TIGHT)}


def differentiable_dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Return cuDNN's attention on heads as they are, or as often as its backward wants them."""
    try:
        torch.autograd.grad(dense(q[:, :, :128], k[:, :, :128], v[:, :, :128]).sum(), (q, k, v))
    except RuntimeError as error:
        print(f"cuDNN has no backward for grouped heads, they are repeated: {error}", flush=True)
        group = q.shape[1] // k.shape[1]
        return lambda: dense(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    return lambda: dense(q, k, v)


class Work:
    """One length: its inputs, its selection and what is timed on them."""

    def __init__(
        self, tokens: int, heads: tuple[int, int], dim: int, block: int, density: float, dtype: torch.dtype
    ) -> None:
        shape = Shape(
            name="", heads=heads[0], kv_heads=heads[1], queries=tokens, keys=tokens, head_dim=dim,
            block_size=(block, block),
        )  # fmt: skip
        self.shape = shape
        self.q, self.k, self.v = (x.requires_grad_() for x in random_qkv(shape, dtype=dtype, device="cuda"))
        self.grad = random_qkv(shape, dtype=dtype, device="cuda", seed=1)[0]
        mask = random_selection(shape, density=density).to_mask()
        # As every policy with sink_blocks has it, and the longest column that there can be.
        mask[..., 0] = True
        self.selection = BlockSelection.from_mask(mask.cuda(), (block, block))
        self.density = self.selection.density(causal_blocks(tokens, tokens, (block, block), "cuda"))
        self.options = Options.of(self.q, self.k)

    def both(self, attend: Callable[[], Tensor]) -> Callable[[], object]:
        """Return forward and backward of a function."""
        return lambda: torch.autograd.grad(attend(), (self.q, self.k, self.v), self.grad)

    def sparse(self, backend: str) -> Callable[[], Tensor]:
        """Return the forward of a backend."""
        return lambda: block_sparse_attention(self.q, self.k, self.v, self.selection, backend=backend)

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return the backward's parts, by name."""
        with torch.no_grad():
            q, k, v = self.q.detach(), self.k.detach(), self.v.detach()
            out, lse = block_sparse_attention(q, k, v, self.selection, return_lse=True)
            shift, delta = backward.rows(self.grad, torch.zeros_like(lse), out, lse)
        rest = self.grad, q, k, v, shift, delta, self.selection, self.options
        found: dict[str, Callable[[], object]] = {
            "rows": lambda: backward.rows(self.grad, torch.zeros_like(lse), out, lse),
            "queries": lambda: backward.queries(*rest),
            "keys": lambda: backward.keys(*rest),
        }
        if "hopper" in self.backends():
            found["keys, hopper"] = lambda: hopper_backward.keys(*rest)
        return found

    def backends(self) -> list[str]:
        """Return the backends on this device that have a backward of their own, the fastest first."""
        given = self.q, self.k, self.v, self.selection, self.options
        return [name for name in ORDER if name != "gather" and not BACKENDS[name].unsupported(*given)]


def check(heads: tuple[int, int], dim: int, block: int, dtype: torch.dtype) -> None:
    """Hold the gradients of a short call to the error budget: what is wrong is not timed."""
    case = Case(
        name="", heads=heads[0] // heads[1] * 2, kv_heads=2, queries=1000, keys=1000,
        head_dim=dim, block_size=(block, block), density=0.2,
    )  # fmt: skip
    check_gradients(by_name("auto"), case, dtype, "cuda")


def measure(work: Work, repeats: int) -> list[dict[str, Any]]:
    """Time everything on one length."""
    names = work.backends()
    timed = {"dense cudnn, forward and backward": work.both(differentiable_dense(work.q, work.k, work.v))}
    timed |= {f"{name}, forward and backward": work.both(work.sparse(name)) for name in names}
    memory = {name: peak_mb(run) for name, run in timed.items()}
    alone: dict[str, Callable[[], object]] = {"dense cudnn, forward": lambda: dense(work.q, work.k, work.v)}
    alone |= {f"{name}, forward": work.sparse(name) for name in names} | work.parts()
    with torch.no_grad():
        seconds = interleaved(alone, repeats=repeats, device="cuda")
    seconds |= interleaved(timed, repeats=repeats, device="cuda")
    base = median(seconds["dense cudnn, forward and backward"])
    shape = work.shape
    pairs = shape.batch * shape.heads * shape.queries * shape.keys / 2
    #: Matrix products over the pairs that are read, 2 * D FLOPs each.
    products = {"rows": 0, "queries": 3, "keys": 4}
    rows = []
    for name, found in seconds.items():
        share = 1.0 if name.startswith("dense") else work.density
        # Both recompute the scores; the sparse backward does so twice, which is not counted as work done.
        count = products.get(name.partition(",")[0], 7 if name.endswith("backward") else 2)
        row = {
            "tokens": shape.keys,
            "variant": name,
            "density": round(share, 4),
            **times(found),
            "tflops": round(count * 2 * shape.head_dim * pairs * share / median(found) / 1e12, 1),
            "speedup": round(base / median(found), 3) if name.endswith("backward") else None,
            "peak_mb": round(memory[name], 1) if name in memory else None,
        }
        rows.append(row)
        print(
            f"{shape.keys:7} {name:36} {row['ms']:9.3f} ms {row['range_ms']} {row['tflops']:7.1f} TFLOP/s  "
            f"speedup {row['speedup']}  peak MB {row['peak_mb']}",
            flush=True,
        )
    return rows


def key_of(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return where the launches of a shape stand in their tables."""
    return dtype.itemsize, max(64, 1 << (dim - 1).bit_length())


def main() -> None:
    """Measure the lengths asked for."""
    parser = kernel_parser(__doc__, [8192, 32768, 131072])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("HQ", "HK"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.1, help="share of earlier blocks that are read")
    args = parser.parse_args()
    dtype, heads = getattr(torch, args.dtype), (args.heads[0], args.heads[1])
    key = key_of(args.head_dim, dtype)
    places = {part: [(table, key) for table in tables] for part, tables in TABLES.items()}
    override(places, args.set)
    check(heads, args.head_dim, args.block, dtype)
    about = {"dtype": args.dtype, "heads": heads, "head_dim": args.head_dim, "block": args.block}
    about |= {"density": args.density, "set": args.set}
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        work = Work(tokens, heads, args.head_dim, args.block, args.density, dtype)
        if args.sweep:
            for part, tried in SWEEP.items():
                sweep(f"{tokens:7} {part:8}", places[part], tried, work.parts()[part])
        else:
            rows += measure(work, args.repeats)
        del work
        torch.cuda.empty_cache()
        # Long ones come last: what is stopped there keeps what it has.
        write(
            args.out, rows, **about, launches=launches({part: table for part, (table, *_) in TABLES.items()})
        )


if __name__ == "__main__":
    main()
