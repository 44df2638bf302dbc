"""Gates on transformers models: ``attach``, ``detach``, ``save_gates``, ``load_gates``.

`attach` registers an attention function with transformers, adds the gates as child modules
``self_attn.attn_gate`` and hooks the modules whose outputs are q and k before the rotary embedding;
no modelling code is copied. A model family is one file named after its ``model_type`` that says where
those outputs appear.
"""

from seerattention.models._attach import add_gates as add_gates
from seerattention.models._attach import attach as attach
from seerattention.models._attach import attached as attached
from seerattention.models._attach import dense as dense
from seerattention.models._attach import detach as detach
from seerattention.models._attach import set_gates as set_gates
from seerattention.models._attach import set_policy as set_policy
from seerattention.models._attach import usage as usage
from seerattention.models._base import BaseInfo as BaseInfo
from seerattention.models._base import base_checksum as base_checksum
from seerattention.models._call import AttentionCall as AttentionCall
from seerattention.models._checkpoint import load_gates as load_gates
from seerattention.models._checkpoint import save_calibration as save_calibration
from seerattention.models._checkpoint import save_gates as save_gates
from seerattention.models._family import families as families
from seerattention.models._family import refused as refused
from seerattention.models._gates import Gates as Gates
from seerattention.models._gates import new_gates as new_gates
from seerattention.models._hub import model_card as model_card
from seerattention.models._hub import push_to_hub as push_to_hub
from seerattention.models._intercept import cache_argument as cache_argument
from seerattention.models._intercept import intercept as intercept
from seerattention.models._logits import LOGIT_ROWS as LOGIT_ROWS
from seerattention.models._logits import logits_of as logits_of
from seerattention.models._pieces import prefill as prefill
