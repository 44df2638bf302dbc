"""Time the way from q and k to a selection on a GPU, part by part, beside the same in PyTorch.

python benchmarks/select_blocks.py --tokens 32768 131072 --out benchmarks/results/<device>/select_blocks.json
python benchmarks/select_blocks.py --gates default --policies top_k:0.1 --kernels-only
python benchmarks/select_blocks.py --gates sixteen --set select.narrow.block_n=128 select.narrow.warps=8
python benchmarks/select_blocks.py --gates sixteen --sweep
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from script import Place, kernel_parser, override, sweep, times, write

from seerattention.gate import AttnGate, GateConfig
from seerattention.measure.timing import interleaved, peak_mb
from seerattention.ops import score_blocks as score_op
from seerattention.ops import select_blocks as select_op
from seerattention.ops import summarise_blocks as summarise_op
from seerattention.ops.cases.select_blocks import CASES, Case
from seerattention.ops.launch import Launch
from seerattention.ops.select_blocks.kernels import scores
from seerattention.policies import Policy, parse
from seerattention.rows import Rows
from seerattention.testing.inputs import random_qkv

KERNELS: dict[str, Any] = {"select": scores, "summarise": summarise_op.BACKENDS["triton"]}

#: Tried by ``--sweep``.
SCORE_SETTINGS = [
    Launch(rows, columns, warps, stages)
    for rows, columns, warps, stages in itertools.product((64, 128), (64, 128, 256), (4, 8), (1, 2, 3))
    if rows * columns <= 4096 * warps
]
SUMMARY_SETTINGS = [
    Launch(tokens, unroll, warps, 1, programs=programs)
    for tokens, unroll, warps, programs in itertools.product((64, 128, 256), (2, 4, 8), (4, 8), (2, 3, 4))
]


def call_ms(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds a call takes in a row of calls, launches included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


@contextmanager
def in_torch() -> Iterator[None]:
    """Summaries and scores without kernels."""
    orders = summarise_op.ORDER, score_op.ORDER
    summarise_op.ORDER, score_op.ORDER = ("reference",), ("chunked",)
    try:
        yield
    finally:
        summarise_op.ORDER, score_op.ORDER = orders


def parts(
    case: Case, policies: list[Policy], dtype: torch.dtype, *, composing: bool
) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; with ``composing`` also without kernels of select_blocks."""
    q, k, _ = random_qkv(case, dtype=dtype, device="cuda")
    # As a model hands them over: heads after tokens in memory.
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    torch.manual_seed(0)
    config = GateConfig.published(**case.design) if case.published else GateConfig(**case.design)
    gate = AttnGate(config).to("cuda", dtype)
    positions = torch.arange(case.keys, device="cuda")
    k_blocks = gate.compress(k, positions=positions)
    queries = gate.summarise_queries(q, positions=positions)
    args: dict[str, Any] = {"scorer": gate, "rows": Rows.last(case.queries, case.keys)}

    def summarise_k() -> torch.Tensor:
        return gate.compress(k, positions=positions)

    def summarise_q() -> torch.Tensor:
        return gate.summarise_queries(q, positions=positions)

    class Made:
        """The gate with its queries' summaries at hand."""

        block_size, sub_blocks, scale, shares = gate.block_size, gate.sub_blocks, gate.scale, gate.shares
        tokens_per_summary, score_dtype = gate.tokens_per_summary, gate.score_dtype

        def summarise_queries(self, q: torch.Tensor, **_: object) -> torch.Tensor:
            first = int(q.storage_offset() // q.stride(2)) // gate.config.q_sub
            return queries[:, :, first : first + -(-q.shape[2] // gate.config.q_sub)]

    timed: dict[str, Callable[[], object]] = {"summarise q": summarise_q, "summarise k": summarise_k}
    kernels = [
        name
        for name in ("hopper", "triton")
        if not select_op.BACKENDS[name].unsupported(q=q, k_blocks=k_blocks, policy=policies[0], **args)
    ]
    for policy, backend in itertools.product(policies, kernels):
        timed[f"score+policy {policy} {backend}"] = partial(
            select_op.select_blocks,
            q,
            k_blocks,
            policy=policy,
            **(args | {"scorer": Made()}),
            backend=backend,
        )
        timed[f"total {policy} {backend}"] = lambda policy=policy, backend=backend: select_op.select_blocks(
            q, summarise_k(), policy=policy, **args, backend=backend
        )
    for policy in policies if composing else ():

        def composed(policy: Policy = policy) -> object:
            return select_op.select_blocks(q, summarise_k(), policy=policy, **args, backend="composed")

        def plain(policy: Policy = policy) -> object:
            with in_torch():
                return composed(policy)

        timed[f"composed {policy}"] = composed
        timed[f"torch {policy}"] = plain
    return timed


def measure(
    case: Case, policies: list[Policy], dtype: torch.dtype, repeats: int, *, composing: bool
) -> list[dict[str, Any]]:
    """Time every part of one case."""
    rows, timed = [], parts(case, policies, dtype, composing=composing)
    for name, found in interleaved(timed, repeats=repeats, device="cuda").items():
        run = timed[name]
        row = {"case": case.name, "part": name, **times(found, 4)}
        row |= {"call_ms": round(call_ms(run, 10), 4), "extra_mb": round(peak_mb(run, result=False), 1)}
        rows.append(row)
        low, high = row["range_ms"]
        print(
            f"{case.name:16} {name:36} {row['ms']:9.3f} ms ({low:.3f}-{high:.3f})"
            f"  per call {row['call_ms']:8.3f}  extra {row['extra_mb']:8.1f} MB",
            flush=True,
        )
    return rows


def try_launches(case: Case, policy: Policy, dtype: torch.dtype) -> None:
    """Print the times of every part under many launch settings, the best first."""
    timed, wide = parts(case, [policy], dtype, composing=False), dtype == torch.float32
    for part, kernel, group, settings in (
        ("summarise q", "summarise", "pool" if case.published else "project", SUMMARY_SETTINGS),
        ("summarise k", "summarise", "project", SUMMARY_SETTINGS),
        (f"score+policy {policy} triton", "select", "narrow", SCORE_SETTINGS),
    ):
        places: list[Place] = [(KERNELS[kernel].LAUNCHES, "wide" if wide else group)]
        sweep(f"{case.name:16} {part:28}", places, settings, timed[part])


def main() -> None:
    """Measure the cases asked for."""
    parser = kernel_parser(__doc__, [32768, 131072])
    parser.add_argument("--gates", nargs="+", default=["published", "sixteen", "eight", "default"])
    parser.add_argument("--policies", nargs="+", default=["top_k:0.1", "threshold:5e-4"])
    parser.add_argument("--kernels-only", action="store_true", help="leave out what PyTorch computes")
    args = parser.parse_args()
    places: dict[str, list[Place]] = {}
    for name, module in KERNELS.items():
        places |= {f"{name}.{group}": [(module.LAUNCHES, group)] for group in module.LAUNCHES}
        places |= {f"{name}.{key}": [(vars(module), key)] for key in vars(module) if key.endswith("_BYTES")}
    override(places, args.set)
    dtype, policies = getattr(torch, args.dtype), [parse(text) for text in args.policies]
    cases = {c.name: c for c in CASES}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for tokens in args.tokens:
            for gate in args.gates:
                case = cases[f"{gate}-{tokens // 1024}k"]
                if args.sweep:
                    try_launches(case, policies[0], dtype)
                else:
                    rows += measure(case, policies, dtype, args.repeats, composing=not args.kernels_only)
                torch.cuda.empty_cache()
                # Long ones come last: what is stopped there keeps what it has.
                write(args.out, rows, dtype=args.dtype, set=args.set)


if __name__ == "__main__":
    main()
