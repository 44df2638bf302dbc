"""A training run's files: whole or not there, and refused where they belong to another run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file that then becomes ``path``; on failure nothing changes."""
    temporary = path.with_name(f".{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, mine: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return progress and tensors of a checkpoint.

    Args:
        path: The file.
        mine: What the checkpoint must share with this run.

    Raises:
        ValueError: If the file is damaged or of another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the checkpoint {path} is truncated or damaged ({error}); delete it to start again"
        ) from error
    if differing := [key for key in mine if state.get(key) != mine[key]]:
        raise ValueError(
            f"the checkpoint {path} is of another run, {', '.join(differing)} differ; give another "
            "output folder, or delete it to start again"
        )
    return state, tensors


def trim_metrics(path: Path, done: int) -> None:
    """Drop the metrics of steps that came after the checkpoint: they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = "".join(line for line in lines if json.loads(line)["step"] <= done)
        write_whole(path, lambda temporary: temporary.write_text(kept))
