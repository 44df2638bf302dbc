"""``seerattention info``: what runs where on this machine, and why not."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, NamedTuple

import typer

from seerattention.cli._show import console_of, table


class Support(NamedTuple):
    """Whether one backend of an op runs on one device and dtype of q, k and v: no ``reasons`` if it does."""

    op: str
    backend: str
    device: str
    dtype: str
    reasons: list[str]


def support() -> list[Support]:
    """Ask every backend of every op about the devices at hand."""
    import torch

    from seerattention.gate import AttnGate, GateConfig
    from seerattention.ops.dispatch import explain
    from seerattention.ops.options import Options, PoolOptions
    from seerattention.policies import TopK
    from seerattention.rows import Rows
    from seerattention.selection import BlockSelection

    found = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.zeros(1, 2, 128, 64, dtype=dtype, device=device)
            k = q[:, :1]
            qkv, rows = {"q": q, "k": k, "v": k}, Rows.last(128, 128)
            reading = {"selection": BlockSelection.full(rows, (64, 64), device), "options": Options.of(q, k)}
            mapping = {"block_size": (64, 64), "options": PoolOptions.of(q, k)}
            gate = AttnGate(GateConfig(2, 1, 64)).to(device, dtype)
            weight = gate.linear_k.weight.detach()
            k_blocks = torch.zeros(1, 1, 16, 64, dtype=dtype, device=device)
            choice = {"q": q, "k_blocks": k_blocks, "scorer": gate, "policy": TopK(0.1), "rows": rows}
            pooling = {"x": k, "size": gate.config.k_sub, "pools": gate.config.k_pool, "dtype": dtype}
            pooling |= {"weight": weight, "merge": 1, "norm": None, "rotary": None, "rows": None}
            scoring = {"queries": k_blocks, "keys": k_blocks, "sub_blocks": (8, 8), "scale": gate.scale}
            asked: dict[str, dict[str, Any]] = {
                "block_sparse_attention": qkv | reading,
                "summarise_blocks": pooling,
                "score_blocks": scoring | {"rows": None, "block_size": (64, 64)},
                "select_blocks": choice,
                "pooled_attention": qkv | mapping,
            }
            for op, args in asked.items():
                module = importlib.import_module(f"seerattention.ops.{op}")
                for backend, reasons in explain(module.BACKENDS, **args).items():
                    found.append(Support(op, backend, device, str(dtype).removeprefix("torch."), reasons))
    return found


def markdown() -> str:
    """Return the support of this installation as Markdown, for the README."""
    from seerattention.hosts.transformers import families, refused
    from seerattention.hosts.transformers.support import features
    from seerattention.policies import forms

    by_backend: dict[tuple[str, str], list[Support]] = {}
    for row in support():
        by_backend.setdefault((row.op, row.backend), []).append(row)
    lines = ["| operation | backend | CPU float32 | CPU bfloat16 |", "|---|---|---|---|"]
    for (op, backend), rows in by_backend.items():
        cells = ["yes" if not r.reasons else "; ".join(r.reasons) for r in rows if r.device == "cpu"]
        lines.append(f"| `{op}` | `{backend}` | {' | '.join(cells)} |")
    lines += [
        "",
        f"Model families: {', '.join(families())}.",
        "",
        "| refused family | why |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in refused().items()),
        "",
        "Policies: " + ", ".join(f"`{form}`" for form in forms()) + ".",
        "",
        "| attached models | | works |",
        "|---|---|---|",
        *(f"| {f.kind} | {f.name} | {answer(f.reason, f.note)} |" for f in features()),
    ]
    return "\n".join(lines)


def answer(reason: str | None, note: str) -> str:
    """Return a cell of the table of features: yes and how, or no and why."""
    return f"no: {reason}" if reason else f"yes: {note}" if note else "yes"


def crossover_lines() -> list[str]:
    """Return, for the devices at hand, where prefill is dense because that is faster."""
    import torch

    from seerattention.crossover import crossover

    lines = []
    for kind in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        known = crossover(kind)
        lines.append(
            f"dense on {kind:<7} below {known.dense_below:,} tokens (min_tokens=... changes it), "
            f"{known.source}"
        )
        if known.densest:
            table = ", ".join(f"{tokens:,}: {density:.0%}" for tokens, density in known.densest)
            lines.append(f"{'':<17}and above this density, where the policy knows it ahead: {table}")
        if known.cudnn_from and kind == "cuda":
            lines.append(f"{'':<17}by cuDNN from {known.cudnn_from:,} tokens")
    return lines


def layer_report(model: str) -> list[tuple[str, str]]:
    """Return ranges of a model's layers, and which are sparse with gates attached; reads no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from seerattention.hosts.transformers.family import attention_layers, family_of, full_attention_layers

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    family_of(built)
    full = full_attention_layers(built)
    grouped: list[tuple[int, int, str]] = []
    for index in attention_layers(built):
        what = "sparse prefill, dense decoding" if index in full else "dense: sliding-window attention"
        if grouped and grouped[-1][2] == what and grouped[-1][1] == index - 1:
            grouped[-1] = (grouped[-1][0], index, what)
        else:
            grouped.append((index, index, what))
    return [(f"{a}-{b}" if a != b else f"{a}", what) for a, b, what in grouped]


def run(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model to explain.")] = "",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the support table only.")] = False,
) -> None:
    """Show what runs where on this machine and why not; with a model, what its layers would do."""
    if as_markdown:
        print(markdown())
        return
    from rich.text import Text

    from seerattention.baselines import names
    from seerattention.hosts.transformers import families, refused
    from seerattention.hosts.transformers.support import features
    from seerattention.measure.versions import versions
    from seerattention.policies import forms

    console = console_of()
    console.print("  ".join(f"{k} {v}" for k, v in versions().items()))
    rows = []
    for r in support():
        runs = Text("yes", "green")
        if r.reasons:
            runs = Text.assemble(("no", "yellow"), f": {'; '.join(r.reasons)}")
        rows.append((r.op, r.backend, r.device, r.dtype, runs))
    console.print(table(("operation", "backend", "device", "dtype", "runs"), rows, words=True))
    console.print(f"model families   {', '.join(families())}")
    for name, reason in refused().items():
        console.print(f"{'':<17}not {name}: {reason}")
    console.print(f"policies         {', '.join(forms())}", markup=False)
    console.print(f"baselines        {', '.join(names())}")
    for line in crossover_lines():
        console.print(line)
    for f in features():
        console.print(f"{f.kind:<16} {f.name}: {answer(f.reason, f.note)}", markup=False)
    if model:
        console.print(f"\n{model}")
        for layers, what in layer_report(model):
            console.print(f"  layers {layers}: {what}")
