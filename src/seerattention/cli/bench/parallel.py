"""``seerattention bench parallel``: a prompt that several processes share, as JSON and tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from seerattention.cli._show import bar, console_of, formatted
from seerattention.cli.bench._reporter import ProgressReporter
from seerattention.files import check_writable, write_json

#: Columns of the tables, and how a row's values are written.
LAYERS = {
    "tokens": "{tokens:,}",
    "processes": "{processes}",
    "layer ms": "{ms:.4g}",
    "choosing": "{choosing_ms:.4g}",
    "exchange": "{exchange_ms:.4g}",
    "attention": "{attention_ms:.4g}",
    "speedup": "{speedup:.2f}x",
    "efficiency": "{efficiency:.0%}",
    "dense ms": "{dense}",
}
FIRST_TOKENS = {
    "tokens": "{tokens:,}",
    "processes": "{processes}",
    "shared": "{shared}",
    "attention": "{way}",
    "first token s": "{seconds:.4g}",
    "speedup": "{speedup:.2f}x",
    "efficiency": "{efficiency:.0%}",
    "next token ms": "{next}",
    "peak GB": "{peak}",
}


def run(
    out: Annotated[Path, typer.Option(help="File for the results, JSON.")] = Path("runs/parallel.json"),
    tokens: Annotated[list[int] | None, typer.Option(help="Length of the prompt; repeatable.")] = None,
    processes: Annotated[
        list[int] | None,
        typer.Option(help="How many share it; repeatable, default 1, 2, 4 ... up to all."),
    ] = None,
    shape: Annotated[str, typer.Option(help="Of the model: llama-8b or small.")] = "",
    layers: Annotated[
        int, typer.Option(help="Layers of the model whose first token is timed; 0 for none.")
    ] = 8,
    policy: Annotated[str, typer.Option(help="How many blocks are read.")] = "top_k:0.1,sink_blocks=1",
    dense: Annotated[
        bool, typer.Option(help="Time dense attention beside it, shared by torch's context parallelism.")
    ] = True,
    tensor: Annotated[bool, typer.Option(help="Time tensor parallelism over all processes, too.")] = True,
    repeats: Annotated[int, typer.Option(help="Timed rounds, after one that warms up.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda; default the GPU if any.")] = "",
) -> None:
    """Time a prompt that processes share, and its parts, beside dense context parallelism.

    Start it with torchrun: torchrun --nproc-per-node 2 -m seerattention.cli bench parallel. Defaults are the
    shape of Llama 3.1 8B with random weights on GPUs, and a small one on a CPU.
    """
    import torch
    import torch.distributed as dist

    from seerattention.bench.models import SHAPES
    from seerattention.bench.parallel import ParallelPlan, measure

    if not dist.is_torchelastic_launched():
        raise ValueError(
            "processes that share a prompt are started by torchrun: "
            "torchrun --nproc-per-node 2 -m seerattention.cli bench parallel"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        world = dist.get_world_size()
        shape = shape or ("llama-8b" if cuda else "small")
        sizes = SHAPES.get(shape, SHAPES["small"])
        heads = sizes["num_attention_heads"]
        plan = ParallelPlan(
            tokens=tuple(tokens or ((32768, 131072) if cuda else (2048,))),
            processes=tuple(processes or (n for n in (1, 2, 4, 8, 16) if n <= world)),
            shape=shape,
            layers=layers if cuda or layers == 0 else min(layers, 2),
            policy=policy,
            # Torch's ring has no kernel for a CPU.
            dense=dense and cuda,
            tensor=tensor,
            heads=heads,
            kv_heads=sizes["num_key_value_heads"],
            head_dim=sizes["hidden_size"] // heads,
            dtype="bfloat16" if cuda else "float32",
            device=device,
            repeats=repeats,
        )
        console, first = console_of(), dist.get_rank() == 0
        console.quiet = not first
        if first:
            check_writable(out)
        report: dict[str, Any] = {}
        with bar(console) as progress:
            for report in measure(plan, ProgressReporter(console, progress)):
                if first:
                    # Long lengths come last: what is stopped there keeps what it has.
                    write_json(out, report)
        rows = [row | {"dense": _or_nothing(row.get("dense_ms"))} for row in report["layers"]]
        console.print(formatted(LAYERS, rows))
        rows = [
            row | {"peak": _or_nothing(row["peak_gb"]), "next": _or_nothing(row.get("next_token_ms"))}
            for row in report["first_tokens"]
        ]
        console.print(formatted(FIRST_TOKENS, rows))
        console.print(f"{out} has these numbers")
    finally:
        dist.destroy_process_group()


def _or_nothing(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
