"""Distillation: gates learn inside the frozen model's forward pass, and a killed run continues."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.gate import AttnGate
from seerattention.hosts.transformers import AttentionCall, Gates, base_checksum, intercept
from seerattention.hosts.transformers.context import refuse_spreading
from seerattention.hosts.transformers.family import full_attention_layers
from seerattention.hosts.transformers.gates import check_weights
from seerattention.ops.dense_attention import dense_attention
from seerattention.ops.options import Pool
from seerattention.ops.pooled_attention import pooled_attention, pooled_map
from seerattention.rows import Rows
from seerattention.train.config import DistillConfig, Step
from seerattention.train.data import Packed, text_identity
from seerattention.train.layer import gate_scores, learn, rows_of
from seerattention.train.loop import Loop
from seerattention.train.positions import Reach
from seerattention.train.processes import shard_layers
from seerattention.train.replay import Replay
from seerattention.train.share import Batch, Documents, Share, decoder_arguments, share_of
from seerattention.train.shared_text import SharedText
from seerattention.train.target import (
    DECODE_ROWS,
    LEAST_TAKEN,
    decode_rows,
    decode_target,
    mean_map,
    sampled_recall,
    taught_rows,
)

#: Slices of sub-block scores on their way through a layer, with their gradients, in bytes.
SLICES = 80 << 20

#: Slices of what query summaries give blocks, at most so many bytes, and how many there are with gradients.
SHARES, COPIES = 256 << 20, 2


class Distiller(Loop):
    """Trains the gates of a frozen model; memory does not grow with depth.

    While the model's forward pass goes through a layer, the layer's attention and its pooled map are
    computed in one call, the gate's loss is taken and differentiated at once, and everything but the
    gate's gradients is dropped. No gradient reaches the model, and its head never runs. A gate that serves
    several layers learns from the map of each, by the queries and keys of the first, which are kept so long.

    Args: those of `Loop`, of which ``shard`` shards the frozen base, and
        heldout: Held-out sequences, int ``[T]`` each. With them the best gates by recall are kept and
            are the gates at the end.
        reach: Up to which position the gates are taught, by gaps between the blocks of a sequence; default
            the model's own limit where it can read them, the length of the sequences for no gaps.
        seed: Of the gaps.
        share_text: Let all processes share every sequence, each a part of its tokens, instead of taking
            sequences of their own: for those that are longer than one GPU takes. Gates for prefill alone.
        decoder: What runs the model up to its last hidden states; default its own decoder. A model
            that is sharded already is run by the module that knows it is.

    Raises:
        ValueError: If the checkpoint is damaged or belongs to another run, the sequences of a step
            cannot be split evenly, patience is asked for without held-out text, or the reach cannot be had.
        NotImplementedError: If tensor parallelism spread the model over processes, or they cannot share its
            texts.
        OSError: If ``out`` cannot be written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Gates,
        batches: Callable[[int], Batch],
        config: DistillConfig | None = None,
        *,
        out: Path | None = None,
        heldout: Sequence[np.ndarray] = (),
        accelerator: Accelerator | None = None,
        shard: bool | None = None,
        reach: int | None = None,
        seed: int = 0,
        share_text: bool = False,
        decoder: Callable[..., Any] | None = None,
    ) -> None:
        config = config or DistillConfig()
        config = replace(config, lr=config.peak(gates.config.phase))
        super().__init__(model, gates, batches, config, out, accelerator, shard)
        self.config: DistillConfig = config
        self.reach, self.seed = Reach.of(model.config, self.length, reach), seed
        self.decoder = decoder or model.get_decoder()
        self.heldout = heldout
        self.shared = gates.shared(full_attention_layers(model))
        self.phases = gates.config.phases
        self.measures = ("loss", *(f"recall in {phase}" for phase in self.phases))
        self.share_text = share_text and self.accelerator.num_processes > 1
        if share_text:
            refuse_spreading(model)
            self._check_shared()
        self.best = -1.0
        self.stale = 0
        self._kept: dict[str, Tensor] = {}
        self._replay = Replay()
        # Others read the text's length back.
        self._turn_by_position = all(
            not gate.config.rope or gate.angles(1, self.device) is not None for _, gate in gates.items()
        )
        if config.patience and not len(heldout):
            raise ValueError("patience stops on held-out recall; give held-out text or patience=0")
        # One tensor at a time, without fusing: the same result on every run.
        group = {"params": list(self.named_gates.values()), "lr": config.lr, "peak": config.lr}
        self.optimizer = torch.optim.AdamW([group], betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
        if (found := self._resume()) is not None:
            state, tensors = found
            self.best, self.stale = state["best_recall"], state["stale"]
            self._kept = {
                key.removeprefix("best."): value.to(self.device)
                for key, value in tensors.items()
                if key.startswith("best.")
            }
            if self._kept and out is not None:
                check_weights(out, self._kept, {k: v.shape for k, v in gates.state_dict().items()})
        if self.sharded:
            model.requires_grad_(False)
            shard_layers(model, model.get_decoder(), self.accelerator)

    def _check_shared(self) -> None:
        """Refuse gates and texts that processes cannot share."""
        if self.phases != ("prefill",):
            raise ValueError(
                f"processes share texts for gates for prefill, not for {' and '.join(self.phases)}; teach "
                "gates for decoding on sequences that one GPU takes"
            )
        if self.shared:
            raise ValueError("processes share texts for gates with layers_per_gate 1")
        if isinstance(self.batches(0), Packed):
            raise ValueError("processes share texts that are not packed; leave packing off")

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or held-out recall has stopped rising."""
        return super().finished or 0 < self.config.patience <= self.stale

    def _finish(self) -> None:
        self.gates.reach = self.reach.tokens
        if self._kept:
            self.gates.load_state_dict(self._kept)
        if self.out is None:
            return
        after = base_checksum(self.model)
        self._write_run(base_checksum_before=self._weights, base_checksum_after=after)
        if after != self._weights:
            raise RuntimeError(
                "the base model's weights changed during training (checksum "
                f"{self._weights[:12]} before, {after[:12]} after); these gates belong to no saved model"
            )

    def _share(self, batch: Batch) -> Share:
        if self.share_text:
            return share_of(batch, self.gates.config.block_size, 1, 0, self.config.grad_accum)
        return super()._share(batch)

    def _report(self, values: list[float], norms: list[float], density: float, read: Any) -> Step:
        (loss, *recalls), measured = values, {}
        if len(self.heldout) and (self.done % self.config.eval_every == 0 or self.done == self.config.steps):
            measured = self._measure()
            if not all(map(math.isfinite, measured.values())):
                raise self._not_finite(f"step {self.done} has made gates whose scores are not finite")
        found = dict(zip(self.phases, recalls, strict=True))
        return Step(
            self.done, loss, recall=found.get("prefill"), decode_recall=found.get("decode"),
            heldout_recall=measured.get("prefill"), heldout_decode_recall=measured.get("decode"), **read,
        )  # fmt: skip

    @property
    def measured_tokens(self) -> int:
        """Tokens of held-out text that the remaining steps read to measure recall."""
        c, every = self.config, self.config.eval_every
        times = c.steps // every - self.done // every + bool(c.steps % every and not self.finished)
        return times * sum(map(len, self.heldout))

    def memory(self, length: int) -> dict[str, int]:
        """Return the most that weights, optimizer and a layer's maps take; the forward pass comes on top."""
        c, blocks = self.gates.config, -(-length // self.gates.config.block_size)
        # Target, scores, their logarithm and gradients; slices of sub-block scores; pools and summaries in
        # fp32, rotated and not, with gradients.
        pooled = c.num_heads * len(c.q_pool) / c.q_sub + c.num_kv_heads * len(c.k_pool) / c.k_sub
        summaries = c.num_heads / c.q_sub + c.num_kv_heads / c.k_sub
        queries = taught_rows(length, c.block_size, 0.0).num_queries
        taught = -(-queries // c.block_size) if "prefill" in self.phases else 0
        rows = taught + min(DECODE_ROWS, length) * ("decode" in self.phases)
        maps = 8 * 4 * c.num_heads * blocks * rows + SLICES
        if c.shares:
            given = 4 * c.num_heads * blocks * taught * (c.block_size // c.q_sub)
            maps += COPIES * min(SHARES, given)
        return {
            "base": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "gates and optimizer": 16 * self.learned_parameters,
            "one layer's maps per sequence": maps
            + int(4 * length * (pooled * c.head_dim + 5 * summaries * c.dim)),
        }

    def accumulate(self, batch: Batch, density: float) -> Tensor:
        """Run this process's share through the frozen model; leave gradients in the gates."""
        forward = self._forward_shared if self.share_text else self._forward
        share = self._share(batch)
        return torch.stack([forward(*one, share.learned, density) for one in share.passes]).sum(0)

    def _forward(self, tokens: Tensor, documents: Documents, learned: int, density: float) -> Tensor:
        """Run the frozen model once, every layer learning from each document on its own."""
        by_layer, block = dict(self.gates.items()), self.gates.config.block_size
        first: dict[int, tuple[Tensor, Tensor]] = {}
        positions = [self.reach.positions(self.seed, self.index, n, block) for n, _ in documents]
        placed = [at.to(self.device) for at in positions]
        parts: list[Tensor] = []

        def handler(call: AttentionCall) -> Tensor:
            # What a layer reads is chosen by the gate, queries and keys of the first that shares it.
            chooser, outs, start = self.shared.get(call.layer, call.layer), [], 0
            if chooser == call.layer:
                first[chooser] = call.q_nope, call.k_nope
            gate, (q_nope, k_nope) = by_layer[chooser], first[chooser]
            for (length, counts), at in zip(documents, placed, strict=True):
                s = slice(start, start + length)
                q, k, v = (x[:, :, s] for x in (call.q, call.k, call.v))
                start += length
                phases = self.phases if counts else ()
                place = np.random.default_rng((self.seed, self.index, call.layer)).random()
                taught = taught_rows(length, block, place)
                out, targets = _with_targets(gate, q, k, v, call, phases, self.config.target, taught)
                outs.append(out)
                if not counts:
                    continue
                # The layers' mean is reported; gradients are those of the sum over layers.
                values = self._learn(
                    call.layer, gate, (q_nope[:, :, s], k_nope[:, :, s], at.to(q.device)), targets,
                    weight=call.q.shape[0] * length / learned, density=density, taught=taught,
                )  # fmt: skip
                parts.append(values / (len(by_layer) + len(self.shared)))
            return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

        self._decode(tokens, positions, handler)
        return torch.stack(parts).sum(0) if parts else torch.zeros(len(self.measures), device=self.device)

    def _forward_shared(self, tokens: Tensor, documents: Documents, learned: int, density: float) -> Tensor:
        """Run this process's part of texts that all share; every layer learns from its own queries."""
        by_layer, block = dict(self.gates.items()), self.gates.config.block_size
        ((length, _),) = documents
        text = SharedText(len(tokens), length, block)
        places = self.reach.positions(self.seed, self.index, length, block)
        parts = [torch.zeros(len(self.measures), device=self.device)]

        def handler(call: AttentionCall) -> Tensor:
            k, v, k_nope = text.keys(call)
            gate, positions = by_layer[call.layer], places.to(k.device)
            place = np.random.default_rng((self.seed, self.index, call.layer)).random()
            for rows, here, share in text.taught(place):
                target = mean_map(
                    self.config.target,
                    lambda pool, rows=rows, here=here: pooled_map(
                        call.q[:, :, here], k, gate.block_size, pool=pool, rows=rows, scale=call.scale,
                        softcap=call.softcap, sinks=call.sinks, per_kv_head=gate.config.per_kv_head,
                    ),
                )  # fmt: skip
                values, _ = learn(
                    gate, call.q_nope[:, :, here], k_nope, {"prefill": target}, self.objective,
                    share * len(tokens) * length / learned, density, positions=positions, taught=rows,
                )  # fmt: skip
                parts.append(values / len(by_layer))
            return text.dense(call, k, v)

        own = text.part(places)
        mask = torch.ones(len(tokens), len(own), dtype=torch.long, device=self.device)
        with torch.no_grad(), intercept(self.model, handler):
            self.decoder(
                text.part(tokens).to(self.device),
                position_ids=own[None].expand(len(tokens), -1).to(self.device),
                # Without a mask that says it is one text, transformers takes gaps for bounds of several.
                attention_mask=mask,
                use_cache=False,
            )
        return torch.stack(parts).sum(0)

    def _learn(
        self,
        layer: int,
        gate: AttnGate,
        given: tuple[Tensor, Tensor, Tensor],
        targets: dict[str, Tensor],
        **how: Any,
    ) -> Tensor:
        """Call `learn` with queries, keys and their positions; return its values.

        Where it does the same in every step, as a graph: it is hundreds of small kernels.
        """
        phases = tuple(targets)

        def run(q: Tensor, k: Tensor, positions: Tensor, *maps: Tensor) -> Tensor:
            named = dict(zip(phases, maps, strict=True))
            return learn(gate, q, k, named, self.objective, positions=positions, **how)[0]

        tensors = *given, *targets.values()
        taught, length = how["taught"], given[0].shape[2]
        # Runs of rows lie elsewhere in every step, and documents of a pack have lengths of their own.
        if taught.num_queries < length or length != self.length or not self._turn_by_position:
            return run(*tensors)
        name = layer, phases, how["weight"], how["density"], *(x.shape for x in tensors)
        return self._replay(name, run, tensors, list(gate.parameters()))

    def _decode(
        self, tokens: Tensor, positions: Sequence[Tensor], handler: Callable[[AttentionCall], Tensor]
    ) -> None:
        """Run the decoder, without the head, on rows of documents whose tokens have these positions."""
        more = decoder_arguments(self.model, positions, len(tokens), self.device)
        with torch.no_grad(), intercept(self.model, handler):
            self.decoder(tokens.to(self.device), use_cache=False, **more)

    def _measure(self) -> dict[str, float]:
        """Measure recall on the held-out text; keep the gates if its mean over the phases is the best yet."""
        found = self.heldout_recall((self.config.recall_density,))
        recalls = {phase: values[0] for phase, values in found.items()}
        mean = sum(recalls.values()) / len(recalls)
        if mean > self.best:
            self.best, self.stale = mean, 0
            self._kept = {k: v.detach().clone() for k, v in self.gates.state_dict().items()}
        else:
            self.stale += 1
        return recalls

    def heldout_recall(
        self, densities: tuple[float, ...], least: int = LEAST_TAKEN
    ) -> dict[str, list[float]]:
        """Return by phase recall at each density, the mean over layers and sequences; NaN if scores are.

        See `sampled_recall` for ``least``.
        """
        by_layer = dict(self.gates.items())
        first: dict[int, tuple[Tensor, Tensor]] = {}
        found: list[Tensor] = []

        def look(call: AttentionCall) -> Tensor:
            chooser, length = self.shared.get(call.layer, call.layer), call.q.shape[2]
            if chooser == call.layer:
                first[chooser] = call.q_nope, call.k_nope
            gate = by_layer[chooser]
            qkv = call.q, call.k, call.v
            out, targets = _with_targets(gate, *qkv, call, self.phases, self.config.target)
            scores = gate_scores(gate, *first[chooser], call.positions, self.phases)
            recalls = []
            for phase, target in targets.items():
                rows = rows_of(phase, gate, target, scores[phase], length)
                finite = rows.scores.masked_fill(~rows.valid, 0).isfinite().all()
                recalls.append(sampled_recall(rows, densities, least=least).where(finite, torch.nan))
            found.append(torch.stack(recalls))
            return out

        for tokens in self.heldout:
            batch = torch.from_numpy(np.asarray(tokens, np.int64))[None]
            self._decode(batch, [torch.arange(len(tokens))], look)
        mean = torch.stack(found).mean(0)
        # Every process measured the same text; one answer for all keeps them in step.
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean, "mean")
            assert isinstance(mean, Tensor)
        return dict(zip(self.phases, mean.tolist(), strict=True))

    def _about(self) -> dict[str, Any]:
        # None without gaps, as checkpoints from before there were any say it by not saying it.
        reach, seed = (self.reach.tokens, self.seed) if self.reach.has_gaps else (None, None)
        return {"heldout": text_identity(*map(np.asarray, self.heldout)), "reach": reach, "seed": seed}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"best.{name}", value) for name, value in self._kept.items())
        yield from super()._tensors()

    def _progress(self) -> dict[str, Any]:
        return {**super()._progress(), "best_recall": self.best, "stale": self.stale}


def _with_targets(
    gate: AttnGate,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    phases: Collection[str],
    target: str,
    taught: Rows | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return attention as the model computes it, and the map that the gate should predict in each phase.

    That of prefill is of the queries in ``taught``, by default of all.
    """
    more: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
    of_map: dict[str, Any] = {**more, "per_kv_head": gate.config.per_kv_head}
    targets, outs, size = {}, [], gate.block_size
    taught = taught or Rows.last(q.shape[2], q.shape[2])

    def prefill(pool: Pool) -> Tensor:
        if taught.num_queries == q.shape[2] and not outs:
            found = pooled_attention(q, k, v, size, pool=pool, **of_map)
            outs.append(found.out)
            return found.target
        return pooled_map(q[:, :, taught.first : taught.num_keys], k, size, pool=pool, rows=taught, **of_map)

    if "prefill" in phases:
        targets["prefill"] = mean_map(target, prefill)
    if "decode" in phases:
        rows = decode_rows(q.shape[2], q.device)
        targets["decode"] = mean_map(
            target, lambda pool: decode_target(q, k, rows, size[1], pool=pool, **more)
        )
    return outs[0] if outs else dense_attention(q, k, v, **more), targets
