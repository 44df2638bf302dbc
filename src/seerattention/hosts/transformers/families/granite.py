"""granite: q and k before the rotary embedding are the outputs of ``q_proj`` and ``k_proj``."""

from seerattention.hosts.transformers.family import outputs

taps = outputs("q_proj", "k_proj")
