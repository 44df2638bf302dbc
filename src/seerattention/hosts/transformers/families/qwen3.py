"""qwen3: q and k before the rotary embedding are the outputs of ``q_norm`` and ``k_norm``."""

from torch import nn


def taps(attention: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the modules whose outputs are q and k before the rotary embedding."""
    return attention.q_norm, attention.k_norm  # type: ignore[return-value]
