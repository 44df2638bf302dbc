"""qwen3_moe: q and k before the rotary embedding are the outputs of ``q_norm`` and ``k_norm``."""

from seerattention.hosts.transformers.family import outputs

taps = outputs("q_norm", "k_norm")
