"""Load a base model onto a device, and its tokenizer; what other libraries raise ends in a sentence."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from seerattention.files import check_readable

#: What a base model's precision may be; ``auto`` is that of its files.
DTYPES = ("auto", "float32", "bfloat16", "float16")

#: Of what another library says, characters.
SAID = 400


@contextmanager
def outside(what: str) -> Iterator[None]:
    """Turn what another library raises into one sentence that begins with ``what``.

    Errors of the system, of missing packages and of what is not implemented name themselves.

    Raises:
        ValueError: In place of any other error.
    """
    try:
        yield
    except (OSError, ImportError, NotImplementedError, MemoryError):
        raise
    # Nothing narrower would do: tokenizers raises Exception itself, safetensors, jinja2 and huggingface_hub
    # kinds of their own, and transformers whatever it stumbles over, such as KeyError or ZeroDivisionError.
    except Exception as error:
        said = textwrap.shorten(str(error) or type(error).__name__, SAID)
        raise ValueError(f"{what}: {said}") from error


def named_device(name: str = "") -> torch.device:
    """Return the device of a name, by default the GPU if there is one.

    Raises:
        ValueError: If it is no device, or torch cannot use it here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not a device: {error}") from error
    try:
        # Whether it is there and holds numbers.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        said = textwrap.shorten(str(error), SAID)
        raise ValueError(
            f"device {name!r} was asked for, but torch cannot use it here ({said}); use cpu"
        ) from error
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
        OSError: If it is not there or cannot be read.
        ValueError: If the precision or the device is not known or not there, or the model is damaged.
    """
    target, dtype = named_device(device), check_dtype(dtype)
    more = {} if config is None else {"config": config}
    with _loading(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **more)
    if not getattr(model, "is_quantized", False):
        model.to(target)  # type: ignore[arg-type]
    return model.eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; raises as `load_base` does."""
    with _loading(name):
        return AutoTokenizer.from_pretrained(name)


def load_config(name: str) -> PreTrainedConfig:
    """Load a model's configuration; raises as `load_base` does."""
    with _loading(name):
        return AutoConfig.from_pretrained(name)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    folder = Path(name)
    if folder.is_dir():
        for file in folder.iterdir():
            if file.is_file():
                check_readable(file)
    elif not folder.exists() and (len(folder.parts) > 2 or name.startswith((".", "~", os.sep))):
        # No hub id, as which the hub would refuse it.
        raise FileNotFoundError(f"there is no folder {name}; give a folder that holds a model, or a hub id")
    with outside(f"the model {name} cannot be loaded, perhaps its files are damaged"):
        yield
