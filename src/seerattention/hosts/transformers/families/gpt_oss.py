"""gpt_oss: q and k before the rotary embedding are the outputs of ``q_proj`` and ``k_proj``.

Its sinks come with every call of the attention function.
"""

from seerattention.hosts.transformers.family import outputs

taps = outputs("q_proj", "k_proj")
