"""Train a model through its own gates, and the gates with it; context extension, full weights or LoRA.

The loss is the language model's, through block-sparse attention, plus the gates' own, against the map of the
weights as they are. docs/method.md maps symbols to code.
"""

from seerattention.finetune.config import FinetuneConfig as FinetuneConfig
from seerattention.finetune.config import JointStep as JointStep
from seerattention.finetune.prepare import checkpoint_layers as checkpoint_layers
from seerattention.finetune.prepare import extend_context as extend_context
from seerattention.finetune.prepare import prepare as prepare
from seerattention.finetune.save import save_finetuned as save_finetuned
from seerattention.finetune.trainer import Finetuner as Finetuner
