"""The base model that a command's gates belong to."""

from __future__ import annotations

from typing import Any


def base_of_gates(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a base model and its tokenizer, see `named_model`; refuse gates that name none."""
    from seerattention.measure.bundled import named_model

    if not name:
        raise ValueError("these gates do not name their base model; give it by --model")
    return named_model(name, dtype=dtype, device=device)
