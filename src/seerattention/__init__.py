"""SeerAttention: learned block-sparse attention for long prompts.

    model = AutoModelForCausalLM.from_pretrained(...)
    attach(model, load_gates("gates/"), "top_k:0.1")   # prefill now reads a tenth of the attention map
    model.generate(...)
    detach(model)                                      # the model is as it was

`attention.py` is the whole method on one page. Names are imported on first use: the command line answers
``--help`` without torch, and operations do without transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seerattention.later import later

if TYPE_CHECKING:
    from seerattention.attention import seer_attention as seer_attention
    from seerattention.attention import select_blocks as select_blocks
    from seerattention.gate import AttnGate as AttnGate
    from seerattention.gate import GateConfig as GateConfig
    from seerattention.gate import Scorer as Scorer
    from seerattention.hosts.transformers import ContextParallelCache as ContextParallelCache
    from seerattention.hosts.transformers import add_gates as add_gates
    from seerattention.hosts.transformers import attach as attach
    from seerattention.hosts.transformers import dense as dense
    from seerattention.hosts.transformers import detach as detach
    from seerattention.hosts.transformers import load_gates as load_gates
    from seerattention.hosts.transformers import new_gates as new_gates
    from seerattention.hosts.transformers import prefill as prefill
    from seerattention.hosts.transformers import push_to_hub as push_to_hub
    from seerattention.hosts.transformers import save_gates as save_gates
    from seerattention.hosts.transformers import set_gates as set_gates
    from seerattention.hosts.transformers import set_policy as set_policy
    from seerattention.ops.block_sparse_attention import block_sparse_attention as block_sparse_attention
    from seerattention.ops.block_sparse_decode import block_sparse_decode as block_sparse_decode
    from seerattention.ops.pooled_attention import pooled_attention as pooled_attention
    from seerattention.policies import Calibrated as Calibrated
    from seerattention.policies import Policy as Policy
    from seerattention.policies import Threshold as Threshold
    from seerattention.policies import TokenBudget as TokenBudget
    from seerattention.policies import TopK as TopK
    from seerattention.policies import TopP as TopP
    from seerattention.selection import BlockSelection as BlockSelection
    from seerattention.selection import causal_blocks as causal_blocks

__getattr__, __dir__, __all__ = later(
    __name__,
    {
        "attention": "seer_attention select_blocks",
        "gate": "AttnGate GateConfig Scorer",
        "hosts.transformers": "ContextParallelCache add_gates attach dense detach load_gates new_gates "
        "prefill push_to_hub save_gates set_gates set_policy",
        "ops.block_sparse_attention": "block_sparse_attention",
        "ops.block_sparse_decode": "block_sparse_decode",
        "ops.pooled_attention": "pooled_attention",
        "policies": "Calibrated Policy Threshold TokenBudget TopK TopP",
        "selection": "BlockSelection causal_blocks",
    },
)
