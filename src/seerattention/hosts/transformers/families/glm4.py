"""glm4: q and k before the rotary embedding are the outputs of ``q_proj`` and ``k_proj``."""

from seerattention.hosts.transformers.family import halves, outputs

taps = outputs("q_proj", "k_proj")


def order(head_dim: int, rotated: int) -> list[int]:
    """Order a head's values for gates: the model rotates neighbours among the first ``rotated`` values."""
    return halves(head_dim, rotated, interleaved=True)
