"""The base model that a command's gates belong to."""

from __future__ import annotations

from typing import Any


def base_of_gates(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a base model and its tokenizer.

    Args:
        name: Hub id or folder, or the name of the bundled teacher.
        dtype: Precision, as the options of commands say.
        device: Where it runs, as the options of commands say.

    Raises:
        ValueError: If there is no name, or precision or device are not known or not there.
    """
    from transformers import AutoTokenizer

    from seerattention.cli.distill import load_base
    from seerattention.measure import bundled

    if name == bundled.TEACHER_NAME:
        # Small enough for any CPU, and the gates are used in its precision.
        return bundled.load_teacher()
    if not name:
        raise ValueError("these gates do not name their base model; give it by --model")
    return load_base(name, dtype, device), AutoTokenizer.from_pretrained(name)
