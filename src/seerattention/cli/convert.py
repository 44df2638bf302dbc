"""``seerattention convert``: from published gates to a folder of safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seerattention.cli._show import about_gates, console_of


def run(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id with config.json and attn_gate_weights.pth, such as "
            "SeerAttention/SeerAttention-Llama-3.1-8B-AttnGates."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="New folder, or gates to replace; written all or nothing.")],
    policy: Annotated[
        str,
        typer.Option(
            help="Policy saved with the gates for their phase, e.g. threshold:5e-4,dense_last_rows=2; "
            "default the one their settings name, if any."
        ),
    ] = "",
) -> None:
    """Write published gates as safetensors, precision kept. Code in the source is refused, never run."""
    from seerattention.hosts.transformers import load_gates, save_gates
    from seerattention.policies import parse

    chosen = str(parse(policy)) if policy else None
    gates = load_gates(source)
    if gates.config.phase == "decode":
        gates.decode_policy = chosen or gates.decode_policy
    else:
        gates.policy = chosen or gates.policy
    save_gates(gates, target)
    lines = [*about_gates(gates), f"output      {target}"]
    console_of().print("\n".join(lines), markup=False, soft_wrap=True)
