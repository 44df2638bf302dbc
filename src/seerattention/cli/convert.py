"""``seerattention convert``: from published gates to a folder of safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seerattention.cli._show import console_of


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
            help="Policy saved with the gates, e.g. threshold:5e-4,dense_last_rows=2; default the one their "
            "settings name, if any."
        ),
    ] = "",
) -> None:
    """Write published gates as safetensors, precision kept. Code in the source is refused, never run."""
    from seerattention.hosts.transformers import load_gates, save_gates
    from seerattention.policies import parse

    chosen = str(parse(policy)) if policy else None
    gates = load_gates(source)
    save_gates(gates, target, policy=chosen)
    config = gates.config
    kind = "decode, one score per KV head" if config.per_kv_head else "prefill, one score per query head"
    first = next(gate for _, gate in gates.items())
    parameters = list(gates.parameters())
    size = sum(p.numel() for p in parameters)
    console_of().print(
        f"gates       {kind}, for {gates.base.name}\n"
        f"layers      {len(gates.layers)}, of {config.num_heads} query and {config.num_kv_heads} KV heads of "
        f"{config.head_dim}; blocks of {config.block_size} tokens\n"
        f"per layer   {', '.join(f'{n} {list(v.shape)}' for n, v in first.state_dict().items())}\n"
        f"size        {size / 1e6:.2f} M parameters, {parameters[0].dtype}\n"
        f"policy      {chosen or gates.policy or 'none in the settings; give attach one'}\n"
        f"output      {target}",
        markup=False,
        soft_wrap=True,
    )
