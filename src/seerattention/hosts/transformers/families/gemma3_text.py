"""gemma3_text: q and k before the rotary embedding are the outputs of ``q_norm`` and ``k_norm``."""

from torch import nn
from transformers import PreTrainedConfig

from seerattention.hosts.transformers.family import Tap


def taps(attention: nn.Module) -> tuple[Tap, Tap]:
    """Return where q and k before the rotary embedding are."""
    q_norm, k_norm = attention.get_submodule("q_norm"), attention.get_submodule("k_norm")
    return Tap(q_norm, heads_first=True), Tap(k_norm, heads_first=True)


def unsupported(config: PreTrainedConfig) -> str | None:
    """Return why models of this configuration are refused."""
    if config.model_type != "gemma3_text":
        return (
            "image tokens see later ones, and block-sparse attention is causal; load it as Gemma3ForCausalLM"
        )
    if getattr(config, "use_bidirectional_attention", False):
        return "with use_bidirectional_attention tokens see later ones, and block-sparse attention is causal"
    return None
