"""Load a base model onto a device."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

#: What a base model's precision may be; ``auto`` is that of its files.
DTYPES = ("auto", "float32", "bfloat16", "float16")


def named_device(name: str = "") -> torch.device:
    """Return the device of a name, by default the GPU if there is one.

    Raises:
        ValueError: If it is no device, or a GPU where torch sees none.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not a device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU; use cpu")
    return device


def check_dtype(dtype: str) -> str:
    """Return the name of a precision, refusing what is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def load_base(
    name: str, *, dtype: str = "auto", device: str = "", config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Load a base model in evaluation mode.

    Args:
        name: Hub id or folder.
        dtype: One of `DTYPES`.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; default the GPU if there is one. Quantised weights stay
            where they were loaded.
        config: Another configuration than the model's own.

    Raises:
        ValueError: If the precision or the device is not known or not there.
    """
    target, dtype = named_device(device), check_dtype(dtype)
    more = {} if config is None else {"config": config}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **more)
    if not getattr(model, "is_quantized", False):
        model.to(target)  # type: ignore[arg-type]
    return model.eval()
