"""glm4: q and k before the rotary embedding are the outputs of ``q_proj`` and ``k_proj``."""

from torch import nn

from seerattention.hosts.transformers.family import halves


def taps(attention: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the modules whose outputs are q and k before the rotary embedding."""
    return attention.q_proj, attention.k_proj  # type: ignore[return-value]


def order(head_dim: int, rotated: int) -> list[int]:
    """Order a head's values for gates: the model rotates neighbours among the first ``rotated`` values."""
    return halves(head_dim, rotated, interleaved=True)
