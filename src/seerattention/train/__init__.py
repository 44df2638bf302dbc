"""Teach gates, alone or together with their model: one loop, one checkpoint, one data path.

`Distiller` teaches gates the frozen model's own attention: the target comes from `pooled_attention` inside
the forward pass, and an objective compares it with the gate's scores layer by layer, so that memory does not
grow with depth. `Finetuner` trains the model through its gates, and the gates with it: the loss is the
language model's, through block-sparse attention, plus the gates' own. docs/method.md maps symbols to code.
"""

from typing import TYPE_CHECKING

from seerattention.later import later

if TYPE_CHECKING:
    from seerattention.train.config import DistillConfig as DistillConfig
    from seerattention.train.config import FinetuneConfig as FinetuneConfig
    from seerattention.train.config import JointStep as JointStep
    from seerattention.train.config import Step as Step
    from seerattention.train.data import Packed as Packed
    from seerattention.train.data import Packs as Packs
    from seerattention.train.data import TextWindows as TextWindows
    from seerattention.train.data import dataset_documents as dataset_documents
    from seerattention.train.data import read_tokens as read_tokens
    from seerattention.train.data import text_documents as text_documents
    from seerattention.train.distiller import Distiller as Distiller
    from seerattention.train.finetuner import Finetuner as Finetuner
    from seerattention.train.mixture import Mixture as Mixture
    from seerattention.train.recipe import Distillation as Distillation
    from seerattention.train.recipe import Finetuning as Finetuning
    from seerattention.train.save import save_finetuned as save_finetuned
    from seerattention.train.source import Source as Source
    from seerattention.train.target import target_recall as target_recall
    from seerattention.train.trained import checkpoint_layers as checkpoint_layers
    from seerattention.train.trained import extend_context as extend_context
    from seerattention.train.trained import prepare as prepare

__getattr__, __dir__, __all__ = later(
    __name__,
    {
        "config": "DistillConfig FinetuneConfig JointStep Step",
        "data": "Packed Packs TextWindows dataset_documents read_tokens text_documents",
        "distiller": "Distiller",
        "finetuner": "Finetuner",
        "mixture": "Mixture",
        "recipe": "Distillation Finetuning",
        "save": "save_finetuned",
        "source": "Source",
        "target": "target_recall",
        "trained": "checkpoint_layers extend_context prepare",
    },
)
