"""SeerAttention: learned block-sparse attention for long prompts.

    model = AutoModelForCausalLM.from_pretrained(...)
    attach(model, load_gates("gates/"), "top_k:0.1")   # prefill now reads a tenth of the attention map
    model.generate(...)
    detach(model)                                      # the model is as it was

`attention.py` is the whole method on one page. Names that need transformers are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from seerattention.attention import seer_attention as seer_attention
from seerattention.attention import select_blocks as select_blocks
from seerattention.gate import AttnGate as AttnGate
from seerattention.gate import GateConfig as GateConfig
from seerattention.gate import Scorer as Scorer
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

if TYPE_CHECKING:
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

_LATER = {
    "add_gates": "hosts.transformers",
    "attach": "hosts.transformers",
    "dense": "hosts.transformers",
    "detach": "hosts.transformers",
    "load_gates": "hosts.transformers",
    "new_gates": "hosts.transformers",
    "prefill": "hosts.transformers",
    "push_to_hub": "hosts.transformers",
    "save_gates": "hosts.transformers",
    "set_gates": "hosts.transformers",
    "set_policy": "hosts.transformers",
}


def __getattr__(name: str) -> Any:
    """Import the public names that need transformers when they are first used."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
