"""Teach gates to predict the model's own attention: target, objectives, data and the training loop.

The target comes from `seerattention.ops.pooled_attention` inside the frozen model's forward pass; the
objective compares it with the gate's scores, layer by layer, so that memory does not grow with depth.
"""

from seerattention.distill.data import Packed as Packed
from seerattention.distill.data import Packs as Packs
from seerattention.distill.data import TextWindows as TextWindows
from seerattention.distill.data import dataset_documents as dataset_documents
from seerattention.distill.data import read_tokens as read_tokens
from seerattention.distill.data import text_documents as text_documents
from seerattention.distill.target import target_recall as target_recall
from seerattention.distill.trainer import DistillConfig as DistillConfig
from seerattention.distill.trainer import Distiller as Distiller
from seerattention.distill.trainer import Step as Step
