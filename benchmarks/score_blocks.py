"""Time the gate's part of a distillation step on a GPU, beside the same scores in PyTorch.

python benchmarks/score_blocks.py --out benchmarks/results/<device>/score_blocks.json

Scores and gradients of a Llama-3.1-8B layer with the default gate (8-token sub-blocks, E = 128), bf16, then
everything that a layer learns: pools, projection, rotation, scores, loss, recall, and all of it backward.
PyTorch's path is left out where it would take more than half of the memory or too long (--torch-up-to).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from script import override, parser, times, write
from torch import Tensor

from seerattention.gate import AttnGate, GateConfig
from seerattention.measure.timing import interleaved, peak_mb
from seerattention.ops.cases.score_blocks import CASES, Case
from seerattention.ops.score_blocks import BACKENDS, score_blocks
from seerattention.train import layer, objectives
from seerattention.train.target import counted, sampled_recall


def scoring(case: Case, backend: str) -> dict[str, Callable[[], object]]:
    """Return the passes of one backend, by name."""
    q = torch.randn(1, case.heads, case.queries, case.dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, case.kv_heads, case.keys, case.dim, device="cuda", dtype=torch.bfloat16)
    q, k = q.requires_grad_(), k.requires_grad_()
    gradient = torch.randn(case.blocks, device="cuda")
    made: list[Tensor] = []

    def forward() -> Tensor:
        return score_blocks(q, k, case.sub_blocks, **case.geometry, backend=backend)

    def backward() -> object:
        if not made:
            made.append(forward())
        return torch.autograd.grad(made[0], (q, k), gradient, retain_graph=True)

    return {f"{backend} forward": forward, f"{backend} backward": backward}


def learning(case: Case) -> dict[str, Callable[[], object]]:
    """Return what one layer of a training step does for its gate, whole and in parts."""
    tokens = case.queries * 8
    # As a model's projections leave them: heads after tokens in memory.
    q, k = (
        torch.randn(1, tokens, heads, case.dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (case.heads, case.kv_heads)
    )
    gate = AttnGate(GateConfig(case.heads, case.kv_heads, case.dim)).cuda()
    target = torch.rand(case.blocks, device="cuda").tril()
    target /= target.sum(-1, keepdim=True)
    positions, kl = torch.arange(tokens, device="cuda"), objectives.create("kl")
    scores = torch.randn(case.blocks, device="cuda", requires_grad=True)

    def pool() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            gate.summarise_queries(q, positions=positions)
            gate.compress(k, positions=positions)

    return {
        "learn: whole": lambda: layer.learn(gate, q, k, {"prefill": target}, kl, 1.0, 0.1),
        "learn: summaries forward": pool,
        "learn: loss, both passes": lambda: kl(*counted(target, scores, (64, 64), tokens)).backward(),
        "learn: recall": lambda: sampled_recall(*counted(target, scores.detach(), (64, 64), tokens), (0.1,)),
    }


def flops(case: Case, name: str) -> float:
    """Operations of the causal products: one forward, one per gradient backward."""
    pairs = case.heads * case.queries * case.keys / 2
    return 2 * case.dim * pairs * (2 if name.endswith("backward") else 1)


def main() -> None:
    """Print a table and write a report."""
    options = parser(__doc__, [8192, 32768, 65536])
    options.add_argument(
        "--set", nargs="+", default=[], metavar="KERNEL.NAME=VALUE", help="e.g. back.stages=2"
    )
    options.add_argument("--torch-up-to", type=int, default=32768, help="tokens (default: %(default)s)")
    args = options.parse_args()
    table = BACKENDS["triton"].LAUNCHES["narrow"]
    override({kernel: [(table, kernel)] for kernel in table}, args.set)
    rows: list[dict[str, Any]] = []
    for case in (c for c in CASES if c.large and c.queries * 8 in args.tokens):
        tokens = case.queries * 8
        calls = scoring(case, "triton") | learning(case)
        if tokens <= args.torch_up_to:
            calls |= scoring(case, "chunked")
        memory = {name: peak_mb(run) for name, run in calls.items()}
        for name, found in interleaved(calls, repeats=args.repeats, device="cuda").items():
            row = {"tokens": tokens, "call": name, **times(found), "extra_mb": round(memory[name], 1)}
            rate = ""
            if not name.startswith("learn"):
                row["tflops"] = round(flops(case, name) / row["ms"] / 1e9, 1)
                rate = f"{row['tflops']:7.1f} TFLOP/s"
            rows.append(row)
            print(
                f"{tokens:7} {name:28} {row['ms']:9.3f} ms {row['extra_mb']:9.1f} MB extra {rate}", flush=True
            )
        del calls
        torch.cuda.empty_cache()
        # Long ones come last: what is stopped there keeps what it has.
        write(args.out, rows, set=args.set)


if __name__ == "__main__":
    main()
