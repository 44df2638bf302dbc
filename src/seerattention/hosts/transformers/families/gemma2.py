"""gemma2: q and k before the rotary embedding are the outputs of ``q_proj`` and ``k_proj``.

Its soft-cap comes with every call of the attention function. Attached models apply it as transformers'
eager attention does, also where some versions would take sdpa, which leaves it out.
"""

from transformers import PreTrainedConfig

from seerattention.hosts.transformers.family import outputs

taps = outputs("q_proj", "k_proj")


def unsupported(config: PreTrainedConfig) -> str | None:
    """Return why models of this configuration are refused."""
    if getattr(config, "use_bidirectional_attention", False):
        return "with use_bidirectional_attention tokens see later ones, and block-sparse attention is causal"
    return None
