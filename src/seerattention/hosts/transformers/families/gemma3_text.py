"""gemma3_text: q and k before the rotary embedding are the outputs of ``q_norm`` and ``k_norm``."""

from transformers import PreTrainedConfig

from seerattention.hosts.transformers.families.gemma2 import unsupported as bidirectional
from seerattention.hosts.transformers.family import outputs

taps = outputs("q_norm", "k_norm", heads_first=True)


def unsupported(config: PreTrainedConfig) -> str | None:
    """Return why models of this configuration are refused."""
    if config.model_type != "gemma3_text":
        return (
            "image tokens see later ones, and block-sparse attention is causal; load it as Gemma3ForCausalLM"
        )
    return bidirectional(config)
