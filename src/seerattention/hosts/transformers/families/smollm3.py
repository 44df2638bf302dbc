"""smollm3: q and k before the rotary embedding are the outputs of ``q_proj`` and ``k_proj``.

Some layers have no rotary embedding.
"""

from transformers import PreTrainedConfig

from seerattention.hosts.transformers.family import outputs

taps = outputs("q_proj", "k_proj")


def rotates(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer applies the rotary embedding; transformers' list holds 1 for those that do."""
    return bool(config.no_rope_layers[layer])
