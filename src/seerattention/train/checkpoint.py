"""A training run's state on disk: whole or not there, and refused where it belongs to another run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from seerattention.files import check_readable, read_text, write_whole
from seerattention.hosts.transformers.gates import infinite
from seerattention.settings import typed
from seerattention.train.processes import like

#: Of the names in a checkpoint; one of another number is of another run.
FORMAT = 3

#: What runs did before there was a setting for it, which their checkpoints lack.
BEFORE = {"target": "max"}


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and, as JSON types, progress and identity of a run."""
    metadata = {"state": json.dumps(state)}
    write_whole(path, lambda file: save_file(tensors, file, metadata=metadata))


def read_checkpoint(
    path: Path, mine: dict[str, Any], progress: dict[str, Any], shapes: dict[str, torch.Size]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return progress and tensors of a checkpoint, which must share with this run what is ``mine``.

    A run of more steps than one that is finished goes on from it: ``config.steps`` may then differ.

    Args:
        path: The checkpoint.
        mine: What identifies this run, as JSON types.
        progress: What the state must hold besides, with values of the right types.
        shapes: Of tensors that must be there; an optimizer's have those of their parameters.

    Raises:
        ValueError: If the file is damaged or of another run.
    """
    check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if state["format"] == FORMAT:
            for name, value in progress.items():
                typed(name, state[name], type(value))
            state["config"] = {**BEFORE, **state["config"]}
            mine, state = {**mine, "gate": _design(mine["gate"])}, {**state, "gate": _design(state["gate"])}
            before = state["config"]["steps"]
            if not 0 < state["step"] <= before:
                raise ValueError(f"step {state['step']} of {before}")
            if state["step"] >= before and mine["config"]["steps"] > before:
                mine = {**mine, "config": {**mine["config"], "steps": before}}
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if differing := list(_differing(mine, state)):
        raise ValueError(
            f"the checkpoint {path} is of another run, {', '.join(differing)} differ; "
            f"{_to_go_on(mine, state, differing)}give another output folder, or delete it to start again"
        )
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            raise _damaged(path, f"it has no {name} of {list(shape)}")
        prefix = f"optimizer.{name}."
        state_of = {k.removeprefix(prefix): v.shape for k, v in tensors.items() if k.startswith(prefix)}
        # A parameter that never had a gradient has none.
        if state_of and state_of != {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}:
            raise _damaged(path, f"the optimizer's state for {name} is not that of {list(shape)}")
    if bad := infinite(tensors):
        raise _damaged(path, f"{bad[0]} is not finite")
    return state, tensors


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"the checkpoint {path} is truncated or damaged ({why}); delete it to start again")


def _design(gate: dict[str, Any]) -> dict[str, Any]:
    """Return a design in which one summary per block is one of its own tokens, as a run's settings say it.

    Before gates could compare shares they compared products.
    """
    gate = {**gate}
    subs = {name: gate["block_size"] for name in ("q_sub_block", "k_sub_block") if gate[name] is None}
    return {"shares": False, **gate, **subs}


def _to_go_on(mine: dict[str, Any], state: dict[str, Any], differing: list[str]) -> str:
    """Return what goes on with a checkpoint from before gates were taught by gaps, made text or shares."""
    products = "gate.shares" in differing
    if state["format"] != FORMAT or (("reach" in state or "reach" not in mine) and not products):
        return ""
    told = [name.removeprefix("config.") for name in differing if name.startswith("config.")]
    asked = [f"{name} {state['config'].get(name)}" for name in told]
    asked += ["retrieval 0", "repeats 0"] * ("text" in differing)
    asked += ["a reach of the length of its sequences"] * ("reach" in differing)
    asked += ["gate.shares false"] * products
    folder = " and the design in its config.toml" if any(n.startswith("gate.") for n in differing) else ""
    return f"it was begun before there were these settings: go on with {', '.join(asked)}{folder}, "


def _differing(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the names under which two runs differ, those of tables with the tables' before them."""
    for name, value in mine.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differing(value, other, f"{prefix}{name}.")
        elif value != other:
            yield f"{prefix}{name}"


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's state by name."""
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            yield f"optimizer.{name}.{key}", value


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Give an optimizer the state that `optimizer_tensors` named."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for name, parameter in named.items():
        prefix = f"optimizer.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        optimizer.state[parameter] = {
            # Only a fused optimizer keeps its step counts on the device.
            key: value if key == "step" and not fused else like(value, parameter)
            for key, value in state.items()
        }


def trim_metrics(path: Path, done: int) -> None:
    """Drop the metrics of steps that came after the checkpoint: they will be written again.

    Raises:
        OSError: If they cannot be read or written.
        ValueError: If there are no metrics in the file, or not only.
    """
    if path.exists():
        lines = [line for line in read_text(path).splitlines(keepends=True) if line.endswith("\n")]
        try:
            kept = [line for line in lines if typed("step", json.loads(line)["step"], int) <= done]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it, the checkpoint goes on without it"
            ) from error
        write_whole(path, lambda temporary: temporary.write_text("".join(kept)))
