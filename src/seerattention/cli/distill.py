"""``seerattention distill``: from a model and some text to a folder of gates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    phase: Annotated[
        Literal["prefill", "decode", "both"] | None,
        typer.Option(help="What new gates choose for: gate.phase."),
    ] = None,
    device: Device = None,
    push_to_hub: Annotated[str, typer.Option(help="Hub repository that gets the gates at the end.")] = "",
    dry_run: DryRun = False,
) -> None:
    """Teach gates to predict a model's own attention. Run again after a stop to continue where it was.

    Several GPUs: accelerate launch -m seerattention.cli distill ... (or torchrun).
    """
    from seerattention.hosts.transformers.hub import check_login
    from seerattention.train import Distillation

    if phase is not None:
        overrides = [*(overrides or ()), f"gate.phase={phase}"]
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
    from seerattention.rows import num_blocks
    from seerattention.train.eight_bits import try_eight_bits
    from seerattention.train.save import GATES
    from seerattention.train.target import LEAST_TAKEN, shown_density

    run = told.start(None if dry_run else out)
    trainer, source, count = run.trainer, told.source, told.config.steps
    read = f"{source.sequences} x {source.length:,} tokens"
    asked = told.config.recall_density
    shown = shown_density(asked, num_blocks(source.length, trainer.gates.config.block_size))
    more = {
        "steps": f"{count} of {read} read {count * source.sequences * source.length:,}; the base is frozen",
        "positions": str(trainer.reach),
        "recall": f"shown at a density of {shown:.1%}",
    }
    if shown > 1.1 * asked:
        more["recall"] += f": recall_density {asked:g} is fewer than {LEAST_TAKEN} blocks of a row"
    plan = _training.planned(run, DENSITIES) if told.report else None
    if (console := _training.go(run, told.model, more, out, dry_run, plan)) is None:
        return
    train(trainer, console, after=plan.tokens if plan else 0)
    if dropped := getattr(run.text.batches, "dropped", 0):
        console.print(f"dropped {dropped:,} documents of fewer than 4 blocks")
    if told.eight_bits >= 0 and (found := try_eight_bits(trainer, told.eight_bits)) is not None:
        console.print(str(found))
    main = trainer.accelerator.is_main_process
    if main:
        save_gates(trainer.gates, out / GATES)
        console.print(f"the gates are in {out / GATES}")
    rows = _training.report(console, run, plan, out / GATES) if plan else []
    if push_to_hub and main:
        here = ("model", "text", "heldout", "device")
        c = trainer.config
        used = flat(told) | {"lr": c.lr, "reach": trainer.reach.tokens}
        address = push(
            trainer.gates,
            push_to_hub,
            data=str(run.text),
            recipe={name: value for name, value in used.items() if name not in here},
            results=[row.values() for row in rows],
        )
        console.print(f"and in {address}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
