"""Scores in eight bits, for gates that choose as well by them: held-out text says whether they do."""

from __future__ import annotations

from typing import NamedTuple

import torch

from seerattention.train.distiller import Distiller

#: What summaries are rounded to.
DTYPE = "float8_e4m3fn"


class Recalls(NamedTuple):
    """Held-out recall in prefill, as gates were taught and by scores in eight bits."""

    taught: float
    rounded: float
    taken: bool

    def __str__(self) -> str:
        """Say what was measured and what came of it."""
        kept = "are taken, which takes less on Hopper GPUs" if self.taken else "are not taken"
        return f"scores in eight bits {kept}: held-out recall {self.rounded:.4f}, {self.taught:.4f} without"


def try_eight_bits(trainer: Distiller, may_lose: float) -> Recalls | None:
    """Let a trainer's gates score in eight bits if that loses next to no recall; every process must call it.

    Rounding is relative to each number: it costs a gate whose summaries hold a large one that says nothing
    more than others, which is why it is measured, and not what every gate does.

    Args:
        trainer: Of gates that are taught.
        may_lose: Recall that may be lost, at the run's density.

    Returns:
        What was measured; None where nothing was: for gates that have a ``score_dtype`` or are not for
        prefill, without held-out text, and on devices that do not multiply eight bits faster.
    """
    gates = trainer.gates
    asked = "prefill" in trainer.phases and gates.config.score_dtype is None and len(trainer.heldout) > 0
    if not asked or not _faster(trainer.device):
        return None

    def recall() -> float:
        return trainer.heldout_recall((trainer.config.recall_density,))["prefill"][0]

    taught = recall()
    gates.score_in(DTYPE)
    rounded = recall()
    taken = rounded >= taught - may_lose
    if not taken:
        gates.score_in(None)
    return Recalls(taught, rounded, taken)


def _faster(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
