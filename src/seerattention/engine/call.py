"""One call of an attention layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from seerattention.ops.dense_attention import dense_attention


@dataclass(frozen=True)
class AttentionCall:
    """The inputs of one attention layer for sequences without padding.

    Attributes:
        layer: Layer index.
        q: After RoPE, ``[B, Hq, Tq, D]``: the last ``Tq`` of ``Tk`` tokens.
        k: After RoPE, ``[B, Hk, Tk, D]``, earlier tokens from the KV cache included.
        v: ``[B, Hk, Tk, D]``.
        q_nope: Before RoPE, ``[B, Hq, Tq, D]``.
        k_nope: Before RoPE, of the new tokens only, ``[B, Hk, Tq, D]``.
        positions: int64 ``[Tq]``, counted from each sequence's first real token.
        scale: Softmax scale.
        slot: Which summaries belong to these sequences: a row of a padded batch, or None.
        cache: The model's KV cache, or None.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None leaves them alone.
        sinks: ``[Hq]``, a logit per head that takes part in the softmax's denominator only, or None.
        position_ids: int64 ``[B or 1, Tq]``, at which the model rotated the new tokens; None where the
            earlier ones did not come right before them, or the model did not say.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    q_nope: Tensor
    k_nope: Tensor
    positions: Tensor
    scale: float
    slot: int | None = None
    cache: Any = None
    softcap: float | None = None
    sinks: Tensor | None = None
    position_ids: Tensor | None = None

    def dense(self) -> Tensor:
        """Return what dense attention computes, ``[B, Hq, Tq, D]``."""
        return dense_attention(
            self.q, self.k, self.v, scale=self.scale, softcap=self.softcap, sinks=self.sinks
        )


#: Computes the output ``[B, Hq, Tq, D]`` of an attention layer.
Handler = Callable[[AttentionCall], Tensor]
