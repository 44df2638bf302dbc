"""The device at hand, by name and capability."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def capability(device_type: str) -> str | None:
    """Return the compute capability of the GPU at hand, None for a CPU."""
    if device_type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def device_name(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        # Linux tells the processor's name in a file, other systems through `platform`.
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on a device: then nothing may wait for it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
