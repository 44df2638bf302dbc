"""deepseek_v3: refused, for the reason of deepseek_v2."""

from seerattention.hosts.transformers.families.deepseek_v2 import unsupported as unsupported
