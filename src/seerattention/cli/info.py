"""``seerattention info``: what runs where on this machine, and why not."""

from __future__ import annotations

import importlib
from collections.abc import Container, Iterable
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from seerattention.cli._show import about_gates, console_of, table

#: Lengths and densities of the table of what is read of a model's prompts.
LENGTHS, DENSITIES = (2048, 8192, 32768, 131072), (0.2, 0.1, 0.05)


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
    from seerattention.ops.options import DecodeOptions, Options, PoolOptions, ScoreOptions, SummaryOptions
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
            step = {"q": q[:, :, -1:], "options": DecodeOptions.of(q[:, :, -1:], k)}
            step["selection"] = BlockSelection.full(Rows.last(1, 128), (1, 64), device)
            mapping = {"block_size": (64, 64), "options": PoolOptions.of(q, k)}
            gate = AttnGate(GateConfig(2, 1, 64)).to(device, dtype)
            weight = gate.linear_k.weight.detach()
            k_blocks = torch.zeros(1, 1, 16, 64, dtype=dtype, device=device)
            choice = {"q": q, "k_blocks": k_blocks, "scorer": gate, "policy": TopK(0.1), "rows": rows}
            pools = {"size": gate.config.k_sub, "pools": gate.config.k_pool, "dtype": dtype}
            scoring = ScoreOptions(sub_blocks=(8, 8), scale=gate.scale)
            asked: dict[str, dict[str, Any]] = {
                "block_sparse_attention": qkv | reading,
                "block_sparse_decode": qkv | step,
                "summarise_blocks": {"x": k, "options": SummaryOptions(**pools, weight=weight)},
                "score_blocks": {"queries": k_blocks, "keys": k_blocks, "options": scoring},
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


def model_report(model: str) -> tuple[list[str], Table]:
    """Return what there is to know of a model before its gates are trained; reads no weights.

    Lines on its heads, the longest text, every layer and the gates that `distill` would make; and what
    settings of ``top_k`` read at lengths up to the longest.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from seerattention.gate import AttnGate, GateConfig
    from seerattention.hosts.transformers.base import head_dim_of
    from seerattention.hosts.transformers.family import attention_layers, family_of, full_attention_layers
    from seerattention.hosts.transformers.load import load_config, outside
    from seerattention.policies import TopK
    from seerattention.rows import num_blocks

    config = load_config(model)
    with torch.device("meta"), outside(f"there is no model as {model} says, perhaps its files are damaged"):
        built = AutoModelForCausalLM.from_config(config)
    family_of(built)
    full, text = full_attention_layers(built), config.get_text_config()
    heads = text.num_attention_heads
    design = GateConfig(heads, getattr(text, "num_key_value_heads", None) or heads, head_dim_of(text))
    with torch.device("meta"):
        size = sum(p.numel() for p in AttnGate(design).parameters()) * len(full)
    longest = max(0, getattr(text, "max_position_embeddings", None) or 0)
    lines = [
        f"{model}: {text.model_type}, {built.num_parameters() / 1e6:,.1f} M parameters",
        f"heads        {heads} of queries, {design.num_kv_heads} of keys and values, of dimension "
        f"{design.head_dim}",
        f"longest text {f'{longest:,} tokens' if longest else 'not in its configuration'}",
        f"gates        {size / 1e6:.2f} M parameters, {size * 4 / 1e6:.1f} MB, in {len(full)} layers; blocks "
        f"of {design.block_size} tokens",
        *(f"layers {layers}: {what}" for layers, what in _ranges(attention_layers(built), full)),
    ]
    rows, policies = [], [TopK(density, sink_blocks=1) for density in DENSITIES]
    for tokens in sorted({n for n in LENGTHS if n < (longest or n + 1)} | {longest or LENGTHS[-1]}):
        blocks = num_blocks(tokens, design.block_size)
        reads = (policy.expected_density(blocks, design.block_size) for policy in policies)
        rows.append([f"{tokens:,}", *(f"{read:.1%}" for read in reads)])
    titles = ["tokens", *(f"top_k:{density:g}" for density in DENSITIES)]
    return lines, table(
        titles, rows, "what is read at a length, in whole blocks: the first, the own, the best"
    )


def _ranges(layers: Iterable[int], full: Container[int]) -> list[tuple[str, str]]:
    """Return ranges of layers, and whether they are sparse with gates attached."""
    grouped: list[tuple[int, int, str]] = []
    for index in layers:
        what = "sparse prefill and decoding" if index in full else "dense: sliding-window attention"
        if grouped and grouped[-1][2] == what and grouped[-1][1] == index - 1:
            grouped[-1] = (grouped[-1][0], index, what)
        else:
            grouped.append((index, index, what))
    return [(f"{a}-{b}" if a != b else f"{a}", what) for a, b, what in grouped]


def run(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model, or a folder of gates.")] = "",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the support table only.")] = False,
) -> None:
    """Show what runs where on this machine and why not; first what a model's layers would do, or gates do."""
    if as_markdown:
        print(markdown())
        return
    from rich.text import Text

    from seerattention.baselines import names
    from seerattention.hosts.transformers import families, load_gates, refused
    from seerattention.hosts.transformers.checkpoint import holds_gates
    from seerattention.hosts.transformers.support import features
    from seerattention.measure.versions import versions
    from seerattention.policies import forms

    console = console_of()
    if holds_gates(model):
        console.print("\n".join(about_gates(load_gates(model))), markup=False, soft_wrap=True)
    elif model:
        lines, reads = model_report(model)
        for line in lines:
            console.print(line, soft_wrap=True)
        console.print(reads)
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
