"""olmo3: q and k before the rotary embedding are the outputs of ``q_norm`` and ``k_norm``, over all heads."""

from seerattention.hosts.transformers.family import outputs

taps = outputs("q_norm", "k_norm")
