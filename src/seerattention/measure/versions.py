"""What a result was measured with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from seerattention.device import device_name


def versions(device: str | None = None) -> dict[str, str]:
    """Return the versions of the package, Python, torch and transformers, and the device.

    Args:
        device: ``cpu`` or ``cuda``, what was measured; default the GPU if there is one.
    """
    return {
        "seerattention": _own_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": device_name(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": str(torch.get_num_threads()),
    }


def _own_version() -> str:
    try:
        return version("seerattention")
    except PackageNotFoundError:
        # Run from a checkout on the path, as `make bench` does on a GPU.
        return "not installed"
