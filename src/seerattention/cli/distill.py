"""``seerattention distill``: from a model and some text to a folder of gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def run(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the base model.")],
    text: Annotated[list[Path], typer.Option(help="Training text: .txt, .jsonl or a folder; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for gates, checkpoint and metrics.")],
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 8192,
    sequences: Annotated[int, typer.Option(help="Sequences per step.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    policy: Annotated[
        str, typer.Option(help="Policy saved with the gates, used where none is given.")
    ] = "top_k:0.1,sink_blocks=1,dense_last_rows=2",
    gate: Annotated[
        str, typer.Option(help='Gate design as JSON, e.g. {"k_sub_block": 16}; default the best known.')
    ] = "{}",
    seed: Annotated[int, typer.Option(help="Of the initial gates and the order of the text.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Precision of the base model: auto, float32, bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; default the GPU if any.")] = "",
) -> None:
    """Teach gates to predict a model's own attention. Run again after a stop to continue where it was."""
    from rich.console import Console
    from transformers import AutoTokenizer

    from seerattention.cli._progress import show
    from seerattention.distill import DistillConfig, Distiller, TextWindows, read_tokens
    from seerattention.models import new_gates, save_gates
    from seerattention.policies import parse

    console = Console()
    parse(policy)
    settings = _settings(gate)
    config = DistillConfig(steps=steps, lr=lr, save_every=save_every)
    base, name = _load(model, dtype, device)
    tokens = read_tokens(text, AutoTokenizer.from_pretrained(model))
    batches = TextWindows(tokens, length, sequences, seed)
    _seed(seed)
    gates = new_gates(base, **settings)
    count = sum(p.numel() for p in gates.parameters())
    console.print(
        f"base model  {name}: {sum(p.numel() for p in base.parameters()) / 1e6:.1f} M parameters, frozen, "
        f"{base.dtype} on {base.device}\n"
        f"gates       {count / 1e6:.2f} M parameters in {len(gates.layers)} layers, blocks of "
        f"{gates.config.block_size} tokens\n"
        f"text        {len(tokens):,} tokens; {steps} steps of {sequences} x {length:,} read "
        f"{steps * sequences * length:,}\n"
        f"output      {out}",
        highlight=False,
    )
    trainer = Distiller(base, gates, batches, config, out=out)
    if trainer.done:
        console.print(f"continuing after step {trainer.done}")
    show(trainer, console)
    save_gates(gates, out / "gates", policy=policy)
    console.print(f"the gates are in {out / 'gates'}", highlight=False)


def _settings(gate: str) -> dict[str, Any]:
    import json

    try:
        settings = json.loads(gate)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'--gate must be a JSON object such as {{"k_sub_block": 16}}, got {gate!r} ({error})'
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"--gate must be a JSON object, got {gate!r}")
    return settings


def _load(model: str, dtype: str, device: str) -> tuple[Any, str]:
    import torch
    from transformers import AutoModelForCausalLM

    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise ValueError(f"--dtype must be one of {', '.join(known)}, got {dtype!r}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(place)
    except RuntimeError as error:
        raise ValueError(f"--device {place!r} is not a device: {error}") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {place} was asked for, but torch sees no GPU; use --device cpu")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    base.to(target)  # type: ignore[arg-type]
    return base.eval(), model


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
