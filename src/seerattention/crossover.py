"""Where dense attention is faster than choosing blocks and reading few: a table per device, measured.

``seerattention bench crossover`` writes an entry of ``data/crossover.json``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seerattention.device import capability, device_name
from seerattention.files import read_json

TABLE = Path(__file__).parent / "data" / "crossover.json"


@dataclass(frozen=True)
class Crossover:
    """What was measured on one device.

    Attributes:
        device: Its name, None for a guess.
        dense_below: Tokens of a sequence below which dense attention is faster.
        densest: Pairs of a length and the density up to which sparse attention is faster there,
            selection included, ascending in length.
        cudnn_from: Tokens from which cuDNN's dense attention pays for planning each new length; None
            where it does not.
        decode_dense_below: Tokens of a sequence below which a dense step of decoding is faster.
        asked: The device that this stands for, where another one was measured.
    """

    device: str | None
    dense_below: int
    densest: tuple[tuple[int, float], ...] = ()
    cudnn_from: int | None = None
    decode_dense_below: int = 0
    asked: str | None = None

    @property
    def source(self) -> str:
        """Where the numbers come from, for messages."""
        if self.device is None:
            return "a guess, not measured on this kind of device"
        return f"measured on {self.device}" + (f", the nearest known to {self.asked}" if self.asked else "")

    def densest_at(self, tokens: int) -> float:
        """Return the density up to which sparse attention is faster, between lengths by interpolation."""
        if not self.densest:
            return 1.0
        lengths, densities = zip(*self.densest, strict=True)
        return float(np.interp(np.log(tokens), np.log(lengths), densities))


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """Return the entries of a table, none if there is no file.

    Raises:
        ValueError: If the file is no such table.
    """
    entries = read_json(path) if path.exists() else []
    named = {"device_type", "device"}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and named <= e.keys() for e in entries):
        raise ValueError(f"{path} is no table as bench crossover writes it; choose another file")
    return entries


def nearest(
    entries: list[dict[str, Any]], device_type: str, name: str, capability: str | None = None
) -> Crossover:
    """Return what entries of `read_table` know about a device, or the one of its type that is most like it.

    GPUs of one compute capability, e.g. ``"9.0"``, are alike whatever their names. Without an entry of the
    type (``cpu`` or ``cuda``), dense attention is never chosen.
    """
    known = [e for e in entries if e["device_type"] == device_type]
    if not known:
        return Crossover(None, 0)

    def likeness(entry: dict[str, Any]) -> tuple[float, ...]:
        apart = abs(float(entry.get("capability") or 0) - float(capability or 0))
        return entry["device"] == name, -apart, SequenceMatcher(None, entry["device"] or "", name).ratio()

    entry = max(known, key=likeness)
    return Crossover(
        device=entry["device"],
        dense_below=entry["dense_below"],
        densest=tuple((r["tokens"], r["densest"]) for r in entry["rows"]),
        cudnn_from=entry.get("cudnn_from"),
        decode_dense_below=entry.get("decode_dense_below", 0),
        asked=name if entry["device"] not in (None, name) else None,
    )


@functools.cache
def crossover(device_type: str) -> Crossover:
    """Return what is known about the device of a type at hand."""
    return nearest(read_table(), device_type, device_name(device_type), capability(device_type))


@torch.compiler.assume_constant_result
def cudnn_from() -> int | None:
    """Tokens from which cuDNN computes dense attention on the GPU at hand; a constant to the compiler."""
    return crossover("cuda").cudnn_from
