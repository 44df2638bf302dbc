"""``seerattention finetune``: a model and its gates learn together, also to read further than before."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seerattention.cli import _training
from seerattention.cli._show import train
from seerattention.cli._training import Config, Device, DryRun, Length, Model, Set, Steps, Text

if TYPE_CHECKING:
    from seerattention.train import Finetuning

#: What the help says about settings.
keys = partial(_training.keys, "Finetuning")


def run(
    out: Annotated[Path, typer.Option(help="Folder for model, gates, checkpoint, metrics and config.toml.")],
    model: Model = None,
    gates: Annotated[
        str | None, typer.Option(help="Folder or hub id of gates to start from; default new ones.")
    ] = None,
    text: Text = None,
    steps: Steps = None,
    length: Length = None,
    config: Config = None,
    overrides: Set = None,
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model through the blocks that its gates select, and the gates with it.

    Ends with a model that plain transformers loads and gates for it. Run again after a stop to continue
    where it was. Several GPUs: accelerate launch -m seerattention.cli finetune ... (or torchrun).
    """
    from seerattention.train import Finetuning

    told = _training.recipe(
        Finetuning,
        config,
        overrides,
        model=model,
        gates=gates,
        text=text,
        steps=steps,
        length=length,
        device=device,
    )
    with _training.alone(told, out, dry_run):
        _teach(told, out, dry_run)


def _teach(told: Finetuning, out: Path, dry_run: bool) -> None:
    from seerattention.train import save_finetuned
    from seerattention.train.save import GATES, MODEL

    run = told.start(None if dry_run else out)
    tuner, c, source = run.trainer, told.config, told.source
    trained = sum(p.numel() for p in tuner.named.values())
    kind = f"LoRA of rank {told.lora}" if told.lora else "all weights" if trained else "the gates alone"
    positions = tuner.model.config.get_text_config()
    rope = (getattr(positions, "rope_parameters", None) or {}).get("rope_type", "default")
    least, most = c.densities
    reads = f"{least:g}" if least == most else f"{least:g} to {most:g}, drawn per step,"
    fall = f", falling from 1 over {c.dense_share:.0%} of the steps" if c.dense_share else ""
    more = {
        "steps": f"{c.warmup_gate_steps} of the gates alone, then {c.steps} joint, of {source.sequences} x "
        f"{source.length:,} tokens",
        "trained": f"{kind}, {trained / 1e6:.2f} M parameters; RoPE {rope}, reads "
        f"{positions.max_position_embeddings:,} tokens",
        "attention": f"a density of {reads} on backend {tuner.backend}{fall}",
    }
    if (console := _training.go(run, told.model, more, out, dry_run)) is None:
        return
    if (first := tuner.warm_up()) is not None:
        train(first, console, "gates alone")
    train(tuner, console, "joint")
    folder = save_finetuned(tuner, out, policy=told.policy, tokenizer=run.tokenizer, rebuild=run.rebuild)
    what = "the model is" if folder.name == MODEL else "the base is quantised, so the adapters alone are"
    console.print(f"{what} in {folder}, its gates in {out / GATES}")
    if told.report:
        _training.report(console, run, tuple(sorted(set(c.densities), reverse=True)), out / GATES)
    tuner.accelerator.wait_for_everyone()
    tuner.accelerator.end_training()
