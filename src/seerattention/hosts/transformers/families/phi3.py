"""phi3: q and k before the rotary embedding are columns of ``qkv_proj``'s output."""

from typing import Any

from torch import nn

from seerattention.hosts.transformers.family import Tap, halves


def taps(attention: nn.Module) -> tuple[Tap, Tap]:
    """Return where q and k before the rotary embedding are."""
    module: Any = attention
    q = module.config.num_attention_heads * module.head_dim
    k = module.config.num_key_value_heads * module.head_dim
    return Tap(module.qkv_proj, slice(0, q)), Tap(module.qkv_proj, slice(q, q + k))


def order(head_dim: int, rotated: int) -> list[int]:
    """Order a head's values for gates: the model rotates the halves of the first ``rotated`` values."""
    return halves(head_dim, rotated)
