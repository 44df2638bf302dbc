"""smollm3: q and k before the rotary embedding are the outputs of ``q_proj`` and ``k_proj``.

Some layers have no rotary embedding.
"""

from torch import nn
from transformers import PreTrainedConfig


def taps(attention: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the modules whose outputs are q and k before the rotary embedding."""
    return attention.q_proj, attention.k_proj  # type: ignore[return-value]


def rotates(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer applies the rotary embedding; transformers' list holds 1 for those that do."""
    return bool(config.no_rope_layers[layer])
