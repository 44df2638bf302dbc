"""The joint objective in one forward pass: layers read the blocks that their gates choose, gates learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seerattention.gate import AttnGate
from seerattention.hosts.transformers import AttentionCall
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.dense_attention import dense_attention
from seerattention.ops.pooled_attention import pooled_map
from seerattention.policies import TopK, select
from seerattention.rows import Rows
from seerattention.selection import BlockSelection
from seerattention.train.config import FinetuneConfig
from seerattention.train.layer import gate_scores, learn
from seerattention.train.objectives import Objective
from seerattention.train.share import Documents, Share
from seerattention.train.soft import log_gates, soft_attention
from seerattention.train.target import LEAST_TAKEN, counted, mean_map, sampled_recall

#: q and k before the rotary embedding, without a gradient.
Nope = tuple[Tensor, Tensor]


def policy_of(density: float) -> TopK:
    """Return what chooses blocks in training: top-k, the first and the own block always read."""
    return TopK(density, sink_blocks=1)


@dataclass
class JointPass:
    """Computes the attention of one forward pass and of its repetitions in the backward pass.

    The target is the pooled map of the current weights. No gradient reaches the map or the gates' inputs,
    so the gates' loss does not move the model; without soft gates, the language loss does not move the
    gates. A gate's loss is differentiated inside the layer, as in distillation, so that memory does not
    grow with depth by it. Where gradient checkpointing runs a layer again, the layer reads the same blocks,
    and its gate does not learn twice.

    Attributes:
        gates: The gate of each layer.
        documents: Of every row of the batch, run one by one.
        share: The step's batch, for the weight of each document.
        density: Fraction of the causally valid blocks to read; 1 is dense.
        objective: What the gates minimise.
        settings: Those of the trainer.
        backend: Of `block_sparse_attention`.
        losses: With soft gates, the gates' weighted losses, which the caller differentiates.
    """

    gates: dict[int, AttnGate]
    documents: Documents
    share: Share
    density: float
    objective: Objective
    settings: FinetuneConfig
    backend: str = "auto"
    losses: list[Tensor] = field(default_factory=list)
    _chosen: dict[tuple[int, int], BlockSelection | None] = field(default_factory=dict)
    _values: list[Tensor] = field(default_factory=list)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Return the output of one layer, ``[B, Hq, T, D]``."""
        outs, start = [], 0
        for length, counts in self.documents:
            outs.append(self._document(call, slice(start, start + length), counts))
            start += length
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def values(self, device: torch.device) -> Tensor:
        """Return the gates' loss, without its weight, and recall: fp32 ``[2]``, means over layers."""
        if not self._values:
            return torch.zeros(2, device=device)
        return torch.stack(self._values).sum(0) / len(self.gates)

    def _document(self, call: AttentionCall, where: slice, counts: bool) -> Tensor:
        q, k, v = (x[:, :, where] for x in (call.q, call.k, call.v))
        more = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        if not counts:
            return dense_attention(q, k, v, **more)
        gate, key = self.gates[call.layer], (call.layer, where.start)
        weight = q.shape[0] * q.shape[2] / self.share.learned
        nope = call.q_nope[:, :, where].detach(), call.k_nope[:, :, where].detach()
        if self.settings.soft_gates:
            return self._soft(gate, q, k, v, nope, weight, more)
        if key not in self._chosen:
            # What checkpointing saves and repeats is the layer, not what its gate learns beside it.
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                self._chosen[key] = self._learn(gate, q.detach(), k.detach(), nope, weight, more)
        selection = self._chosen[key]
        if selection is None:
            return dense_attention(q, k, v, **more)
        return block_sparse_attention(q, k, v, selection, backend=self.backend, **more)

    def _learn(
        self, gate: AttnGate, q: Tensor, k: Tensor, nope: Nope, weight: float, more: dict[str, Any]
    ) -> BlockSelection | None:
        """Let a gate learn from the map of q and k; return the blocks that it chooses now, None for all."""
        factor, length = self.settings.gate_weight, q.shape[2]
        scores = None
        if factor:
            target = self._target(gate, q, k, more)
            weighted = {"objective": self.objective, "weight": factor * weight, "density": self.density}
            values, found = learn(gate, *nope, {"prefill": target}, **weighted)
            scores = found["prefill"]
            self._values.append(values / factor)
        if self.density >= 1:
            return None
        if scores is None:
            with torch.no_grad():
                scores = gate_scores(gate, *nope, torch.arange(length, device=q.device))["prefill"]
        return self._select(gate, scores, length)

    def _soft(
        self, gate: AttnGate, q: Tensor, k: Tensor, v: Tensor, nope: Nope, weight: float, more: dict[str, Any]
    ) -> Tensor:
        """Attend with the gates' opinions in the logits; leave the gates' loss in ``losses``."""
        length = q.shape[2]
        with torch.enable_grad():
            scores = gate_scores(gate, *nope, torch.arange(length, device=q.device))["prefill"]
        target = self._target(gate, q.detach(), k.detach(), more)
        rows = counted(target, scores, gate.block_size, length)
        loss = self.objective(*rows) * weight
        recall = sampled_recall(rows, (self.density,), least=LEAST_TAKEN)[0]
        self._values.append(torch.stack((loss.detach(), recall * weight)))
        self.losses.append(self.settings.gate_weight * loss)
        if self.density >= 1:
            return dense_attention(q, k, v, **more)
        selection = self._select(gate, scores.detach(), length)
        bias = log_gates(scores, selection, policy_of(self.density), length, self.settings.temperature)
        return soft_attention(q, k, v, selection, bias, **more)

    def _select(self, gate: AttnGate, scores: Tensor, length: int) -> BlockSelection:
        rows = Rows.last(length, length)
        return select(policy_of(self.density), scores, rows=rows, block_size=gate.block_size)

    @torch.no_grad()
    def _target(self, gate: AttnGate, q: Tensor, k: Tensor, more: dict[str, Any]) -> Tensor:
        sinks = None if more["sinks"] is None else more["sinks"].detach()
        options = {**more, "sinks": sinks, "per_kv_head": gate.config.per_kv_head}
        return mean_map(
            self.settings.target, lambda pool: pooled_map(q, k, gate.block_size, pool=pool, **options)
        )
