"""Gates in vLLM: a plugin whose backends compute prompts sparsely and leave decoding to vLLM's own kernels.

vLLM calls `register` in each of its processes. Nothing changes until an engine is given settings:

    LLM(model, additional_config={"seerattention": {"gates": "gates/", "policy": "top_k:0.1"}})

This room stands on ``hosts.transformers``, since vLLM describes models by transformers' configurations.
"""

from __future__ import annotations


def register() -> None:
    """Offer sparse prompts to engines that are given settings; the entry point ``vllm.general_plugins``."""
    from seerattention.hosts.vllm import plugin

    plugin.register()
