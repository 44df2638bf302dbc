"""``seerattention distill``: from a model and some text to a folder of gates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seerattention.cli import _training
from seerattention.cli._show import train
from seerattention.cli._training import Config, Device, DryRun, Length, Model, Set, Steps, Text
from seerattention.settings import flat

if TYPE_CHECKING:
    from seerattention.train import Distillation

#: Densities of the report at the end.
DENSITIES = (0.2, 0.1, 0.05)

#: What the help says about settings.
keys = partial(_training.keys, "Distillation")


def run(
    out: Annotated[Path, typer.Option(help="Folder for gates, checkpoint, metrics and config.toml.")],
    model: Model = None,
    text: Text = None,
    steps: Steps = None,
    length: Length = None,
    config: Config = None,
    overrides: Set = None,
    device: Device = None,
    push_to_hub: Annotated[str, typer.Option(help="Hub repository that gets the gates at the end.")] = "",
    dry_run: DryRun = False,
) -> None:
    """Teach gates to predict a model's own attention. Run again after a stop to continue where it was.

    Several GPUs: accelerate launch -m seerattention.cli distill ... (or torchrun).
    """
    from seerattention.hosts.transformers.hub import check_login
    from seerattention.train import Distillation

    told = _training.recipe(
        Distillation, config, overrides, model=model, text=text, steps=steps, length=length, device=device
    )
    if push_to_hub:
        check_login(push_to_hub)
    with _training.alone(told, out, dry_run):
        _teach(told, out, push_to_hub, dry_run)


def _teach(told: Distillation, out: Path, push_to_hub: str, dry_run: bool) -> None:
    from seerattention.hosts.transformers import push_to_hub as push
    from seerattention.hosts.transformers import save_gates
    from seerattention.train.save import GATES

    run = told.start(None if dry_run else out)
    trainer, source, count = run.trainer, told.source, told.config.steps
    read = f"{source.sequences} x {source.length:,} tokens"
    more = {
        "steps": f"{count} of {read} read {count * source.sequences * source.length:,}; the base is frozen"
    }
    if (console := _training.go(run, told.model, more, out, dry_run)) is None:
        return
    train(trainer, console)
    if dropped := getattr(run.text.batches, "dropped", 0):
        console.print(f"dropped {dropped:,} documents of fewer than 4 blocks")
    main = trainer.accelerator.is_main_process
    if main:
        save_gates(trainer.gates, out / GATES, policy=told.policy)
        console.print(f"the gates are in {out / GATES}")
    rows = _training.report(console, run, DENSITIES, out / GATES) if told.report else []
    if push_to_hub and main:
        here = ("model", "text", "heldout", "device")
        address = push(
            trainer.gates,
            push_to_hub,
            policy=told.policy,
            data=str(run.text),
            recipe={name: value for name, value in flat(told).items() if name not in here},
            results=[row.values() for row in rows],
        )
        console.print(f"and in {address}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
