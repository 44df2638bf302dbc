"""mistral: q and k before the rotary embedding are the outputs of ``q_proj`` and ``k_proj``."""

from torch import nn


def taps(attention: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the modules whose outputs are q and k before the rotary embedding."""
    return attention.q_proj, attention.k_proj  # type: ignore[return-value]
