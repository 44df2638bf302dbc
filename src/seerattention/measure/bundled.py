"""What ships with the package: a small teacher, gates for it, and a text it never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seerattention.hosts.transformers import Gates, load_base, load_gates, named_device
from seerattention.hosts.transformers.load import check_dtype, load_tokenizer
from seerattention.hosts.transformers.text import encoded

DATA = Path(__file__).parents[1] / "data"
TEACHER = DATA / "teacher"
GATES = DATA / "teacher-gates"
TEXT = DATA / "text" / "the-enchanted-april.txt"

#: What stands for the bundled model, gates or text in the place of a folder or hub id.
BUNDLED = "bundled"

#: The name of the bundled model, in its configuration and in its gates.
TEACHER_NAME = "seerattention/teacher"

#: Tokens at the start of the text that live distillation may train on; the rest is for evaluation.
TRAINING_TOKENS = 24576


def _present(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; reinstall the package, it carries this as data")
    return path


def load_teacher(
    dtype: torch.dtype = torch.float32, folder: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the bundled teacher, in evaluation mode on the CPU, and its tokenizer.

    Args:
        dtype: Of the weights.
        folder: Another teacher of the recipe; default the bundled one.

    Raises:
        FileNotFoundError: If the package was installed without its data.
    """
    folder = _present(folder or TEACHER)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # The folder's place on this machine is not the model's name.
    model.config._name_or_path = TEACHER_NAME
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_teacher_gates() -> Gates:
    """Return the gates distilled for the bundled teacher.

    Raises:
        FileNotFoundError: If the package was installed without its data.
    """
    return load_gates(_present(GATES)).float()


def named_model(
    name: str, *, dtype: str = "auto", device: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model on a device, in evaluation mode, and its tokenizer.

    Args:
        name: Hub id or folder; `BUNDLED` or `TEACHER_NAME` for the bundled teacher.
        dtype: Precision as `load_base` takes it; the teacher's ``auto`` is float32.
        device: As `load_base` takes it.

    Raises:
        ValueError: If there is no name, or the precision or the device is not known or not there.
    """
    if not name:
        raise ValueError("these gates do not name their base model; give its name")
    if name not in (BUNDLED, TEACHER_NAME):
        return load_base(name, dtype=dtype, device=device), load_tokenizer(name)
    target, dtype = named_device(device), check_dtype(dtype)
    model, tokenizer = load_teacher(torch.float32 if dtype == "auto" else getattr(torch, dtype))
    return model.to(target), tokenizer  # type: ignore[arg-type]


def named_gates(name: str) -> Gates:
    """Load gates for prefill from a folder or hub id; `BUNDLED` are those of the bundled teacher."""
    return for_prefill(load_teacher_gates() if name == BUNDLED else load_gates(name))


def for_prefill(gates: Gates) -> Gates:
    """Return gates whose choice in prefill is asked for.

    Raises:
        ValueError: If they choose in decoding alone.
    """
    if "prefill" not in gates.config.phases:
        raise ValueError(
            "these gates were taught for decoding alone, and what they choose in prefill is asked for; give "
            "gates taught for prefill or for both"
        )
    return gates


def text_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Return the bundled text as tokens: a part for live distillation, and the rest for evaluation."""
    tokens = encoded(_present(TEXT).read_text(encoding="utf-8"), tokenizer)
    return tokens[:TRAINING_TOKENS], tokens[TRAINING_TOKENS:]
