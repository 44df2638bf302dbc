"""What a result was measured with."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def versions(device: str | None = None) -> dict[str, str]:
    """Return the versions of the package, Python, torch and transformers, and the device.

    Args:
        device: ``cpu`` or ``cuda``, what was measured; default the GPU if there is one.
    """
    return {
        "seerattention": version("seerattention"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": device_name(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": str(torch.get_num_threads()),
    }


def device_name(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else _processor()


def _processor() -> str:
    """Name the processor; Linux tells it in a file, other systems through ``platform``."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
