"""True maps and the gates' beside them: a text is run densely, and every layer looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.gate import AttnGate
from seerattention.hosts.transformers import AttentionCall, Gates, intercept
from seerattention.hosts.transformers.tensor_parallel import refuse_learning
from seerattention.measure.compare import attached
from seerattention.measure.perplexity import hidden_states
from seerattention.ops.pooled_attention import pooled_map
from seerattention.rows import Rows

T = TypeVar("T")


def true_map(call: AttentionCall, block_size: tuple[int, int]) -> Tensor:
    """Return the map that gates learn, the largest weight of every block, fp32 ``[B, Hq, Nq, Nk]``."""
    return pooled_map(call.q, call.k, block_size, scale=call.scale, softcap=call.softcap, sinks=call.sinks)


@torch.inference_mode()
def record_layers(
    model: PreTrainedModel,
    gates: Gates,
    texts: Sequence[np.ndarray],
    look: Callable[[AttentionCall, AttnGate, Tensor], T],
    step: Callable[[], None] | None = None,
) -> dict[int, list[T]]:
    """Run texts densely and look at what the gates say of the blocks of every layer that has one.

    Args:
        model: The base model, nothing attached. It is left as it was.
        gates: Its gates, on its device.
        texts: int ``[T]`` each.
        look: Called with a layer's inputs, its gate, and the gate's scores, fp32 ``[B, H, Nq, Nk]``, -inf
            where acausal.
        step: Called after every layer of every text.

    Returns:
        What ``look`` returned of every text, by layer.

    Raises:
        FloatingPointError: If the gates' scores are not finite.
        NotImplementedError: If tensor parallelism spread the model over processes.
        ValueError: If the gates are not the model's.
    """
    refuse_learning(model)
    by_layer = dict(gates.items())
    found: dict[int, list[T]] = {layer: [] for layer in by_layer}

    def handler(call: AttentionCall) -> Tensor:
        if (gate := by_layer.get(call.layer)) is None:
            return call.dense()
        scores = gate(call.q_nope, call.k_nope, positions=call.positions).float()
        check_finite(call.layer, scores)
        valid = Rows.last(call.q.shape[2], call.k.shape[2]).causal(gate.block_size, scores.device)
        found[call.layer].append(look(call, gate, scores.masked_fill_(~valid, float("-inf"))))
        if step is not None:
            step()
        return call.dense()

    # Checks that they belong together, and lets the gates rotate as the model does.
    with attached(model, gates, "top_k:1"), intercept(model, handler):
        for tokens in texts:
            hidden_states(model, tokens)
    return found


def check_finite(layer: int, *values: Tensor) -> None:
    """Refuse to go on with what is not finite; waits for the device.

    Raises:
        FloatingPointError: If a value is NaN or infinite.
    """
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise FloatingPointError(
            f"the scores or the attention of layer {layer} are NaN or infinite; check the gates, and load "
            "the model in float32 or bfloat16"
        )
