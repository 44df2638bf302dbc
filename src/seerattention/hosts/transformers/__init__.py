"""Gates on transformers models: ``attach``, ``detach``, ``save_gates``, ``load_gates``.

`attach` registers an attention function with transformers, adds the gates as child modules
``self_attn.attn_gate`` and hooks the modules whose outputs are q and k before the rotary embedding;
no modelling code is copied. A model family is one file named after its ``model_type`` that says where
those outputs appear.
"""

from seerattention.engine.call import AttentionCall as AttentionCall
from seerattention.hosts.transformers.attach import add_gates as add_gates
from seerattention.hosts.transformers.attach import attach as attach
from seerattention.hosts.transformers.attach import attached as attached
from seerattention.hosts.transformers.attach import dense as dense
from seerattention.hosts.transformers.attach import detach as detach
from seerattention.hosts.transformers.attach import set_gates as set_gates
from seerattention.hosts.transformers.attach import set_policy as set_policy
from seerattention.hosts.transformers.attach import usage as usage
from seerattention.hosts.transformers.base import BaseInfo as BaseInfo
from seerattention.hosts.transformers.base import base_checksum as base_checksum
from seerattention.hosts.transformers.checkpoint import load_gates as load_gates
from seerattention.hosts.transformers.checkpoint import save_calibration as save_calibration
from seerattention.hosts.transformers.checkpoint import save_gates as save_gates
from seerattention.hosts.transformers.context import ContextParallelCache as ContextParallelCache
from seerattention.hosts.transformers.family import families as families
from seerattention.hosts.transformers.family import refused as refused
from seerattention.hosts.transformers.gates import Gates as Gates
from seerattention.hosts.transformers.gates import new_gates as new_gates
from seerattention.hosts.transformers.hub import model_card as model_card
from seerattention.hosts.transformers.hub import push_to_hub as push_to_hub
from seerattention.hosts.transformers.intercept import cache_argument as cache_argument
from seerattention.hosts.transformers.intercept import intercept as intercept
from seerattention.hosts.transformers.load import load_base as load_base
from seerattention.hosts.transformers.load import named_device as named_device
from seerattention.hosts.transformers.logits import LOGIT_ROWS as LOGIT_ROWS
from seerattention.hosts.transformers.logits import logits_of as logits_of
from seerattention.hosts.transformers.pieces import prefill as prefill
