"""The training loop: gates learn inside the frozen model's forward pass, and a killed run continues."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.gate import AttnGate
from seerattention.hosts.transformers import AttentionCall, Gates, base_checksum, intercept
from seerattention.ops.pooled_attention import pooled_attention
from seerattention.train import objectives
from seerattention.train.data import Packed
from seerattention.train.layer import gate_scores, learn, sampled_recall
from seerattention.train.loop import (
    Batch,
    Documents,
    Loop,
    cosine_rate,
    make_accelerator,
    optimizer_tensors,
    packed_arguments,
    restore_optimizer,
    shard_layers,
)


@dataclass(frozen=True)
class DistillConfig:
    """How to train; a run is resumed only with the settings it was started with.

    Attributes:
        steps: Optimizer steps.
        lr: Peak learning rate of AdamW, without weight decay; it follows a cosine to zero.
        warmup: Share of the steps in which the rate rises linearly.
        save_every: Steps between checkpoints.
        recall_density: Density at which recall is reported, in (0, 1].
        objective: What the gates minimise, one of `objectives.names`.
        grad_accum: Forward passes per optimizer step on each process; the sequences of a step are
            split over them, and the result is the same.
        eval_every: Steps between measurements of recall on held-out text.
        patience: Measurements without a better recall after which training stops; 0 never stops early.

    Source: optimizer and schedule, SeerAttention, section 4 (arXiv 2410.13276), with ``kl`` and a rate of
        1e-3; the defaults' measurements, docs/method.md.
    """

    steps: int = 500
    lr: float = 3e-3
    warmup: float = 0.02
    save_every: int = 50
    recall_density: float = 0.1
    objective: str = "sharp_kl"
    grad_accum: int = 1
    eval_every: int = 50
    patience: int = 0

    def __post_init__(self) -> None:
        whole = (("steps", 1), ("save_every", 1), ("grad_accum", 1), ("eval_every", 1), ("patience", 0))
        for name, least in whole:
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if not 0 < self.recall_density <= 1:
            raise ValueError(f"recall_density must be in (0, 1], got {self.recall_density}")
        objectives.create(self.objective)

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        return cosine_rate(self.lr, self.warmup, self.steps, step)


@dataclass(frozen=True)
class Step:
    """What one step reports, the same on every process.

    Attributes:
        step: Steps done, this one included.
        loss: Mean of the objective over layers and the global batch.
        recall: Mean of `sampled_recall` over layers and the global batch.
        tokens: Tokens read in this step by all processes.
        seconds: Time it took.
        heldout_recall: Recall on held-out text after this step, or None where it was not measured.
    """

    step: int
    loss: float
    recall: float
    tokens: int
    seconds: float
    heldout_recall: float | None = None


class Distiller(Loop):
    """Trains the gates of a frozen model; memory does not grow with depth.

    While the model's forward pass goes through a layer, the layer's attention and its pooled map are
    computed in one call, the gate's loss is taken and differentiated at once, and everything but the
    gate's gradients is dropped. No gradient reaches the model, and its head never runs.

    Started by ``torchrun`` or ``accelerate launch``, every process takes an equal share of a step's
    sequences and the gates' gradients are summed over processes, so that the result does not depend on
    their number beyond rounding. With FSDP2 chosen in Accelerate the frozen base is sharded by layer.

    Args:
        model: The base model; its weights do not change.
        gates: The gates to train, in place.
        batches: The global batch of a step counted from 0, without padding; the same for the same step
            on every process, so that a resumed run continues exactly.
        config: How to train.
        out: Folder for the checkpoint, ``metrics.jsonl``, ``run.json`` and, where tensorboard is
            installed, its logs; None keeps nothing. A checkpoint found there is continued, by any
            number of processes.
        heldout: Held-out sequences, int ``[T]`` each. With them the best gates by recall are kept and
            are the gates at the end.
        accelerator: Default a new one, as the launcher set it up.
        shard: Shard the frozen base over the processes with FSDP2; default where Accelerate's
            configuration says FSDP2, which it heeds on GPUs only.
        decoder: What runs the model up to its last hidden states; default its own decoder. A model
            that is sharded already is run by the module that knows it is.

    Raises:
        ValueError: If the checkpoint is damaged or belongs to another run, the sequences of a step
            cannot be split evenly, or patience is asked for without held-out text.
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
        decoder: Callable[..., Any] | None = None,
    ) -> None:
        self.config: DistillConfig = config or DistillConfig()
        accelerator = accelerator or make_accelerator(model.device.type)
        super().__init__(batches, self.config, out, accelerator)
        self.model = model
        self.decoder = decoder or model.get_decoder()
        self.gates = gates
        self.objective = objectives.create(self.config.objective)
        self.heldout = heldout
        self.sharded = bool(self.accelerator.is_fsdp2) if shard is None else shard
        self.best = -1.0
        self.stale = 0
        self._kept: dict[str, Tensor] = {}
        if self.config.patience and not len(heldout):
            raise ValueError("patience stops on held-out recall; give held-out text or patience=0")
        gates.use_rotary_of(model)
        # One tensor at a time, without fusing: the same result on every run.
        self.optimizer = torch.optim.AdamW(
            gates.parameters(), lr=self.config.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False
        )
        self._checksum = ""
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._resume(out)
            self._checksum = base_checksum(model)
            self._write_about(out)
        if self.sharded:
            model.requires_grad_(False)
            shard_layers(model, model.get_decoder(), self.accelerator)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or held-out recall has stopped rising."""
        return self.done >= self.config.steps or 0 < self.config.patience <= self.stale

    def run(self) -> Iterator[Step]:
        """Train step by step, yielding after each; stopping the iteration in between loses nothing saved.

        Raises:
            FloatingPointError: If the loss is not finite. The gates keep their last good values and the
                last checkpoint stays.
            RuntimeError: If the base model's weights are not what they were before.
        """
        yield from super().run()

    def _finish(self) -> None:
        if self._kept:
            self.gates.load_state_dict(self._kept)
        if self.out is not None:
            self._check_base(self.out)

    def time_a_step(self) -> float:
        """Return the seconds of a step's forward and backward pass; the gates stay as they are."""
        started = time.perf_counter()
        self._all_reduce(self._accumulate(self.batches(self.done))).tolist()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def _step(self) -> Step:
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.batches(self.done)
        tokens = batch.tokens if isinstance(batch, Packed) else batch
        loss, recall, norm = self._all_reduce(self._accumulate(batch)).tolist()
        self._check_finite(loss, norm)
        self.optimizer.step()
        self.done += 1
        measured = None
        if len(self.heldout) and (self.done % self.config.eval_every == 0 or self.done == self.config.steps):
            measured = self._measure()
        return Step(self.done, loss, recall, tokens.size, time.perf_counter() - started, measured)

    def _check_finite(self, loss: float, norm: float) -> None:
        """Raise before the optimizer spreads a loss or a gradient that is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        kept = f"; the checkpoint in {self.out} is the last good one" if self.out else ""
        raise FloatingPointError(
            f"step {self.done + 1} has loss {loss} and gradient norm {norm}, the gates were not changed by "
            f"it{kept}; lower the learning rate or look at this step's batch"
        )

    def _accumulate(self, batch: Batch) -> Tensor:
        """Run this process's share through the frozen model; leave gradients in the gates.

        Returns:
            fp32 ``[2]``, this share's part of the global loss and recall.
        """
        share = self._share(batch, self.gates.config.block_size)
        totals = [self._forward(tokens, documents, share.learned) for tokens, documents in share.passes]
        return torch.stack(totals).sum(0)

    def _forward(self, tokens: Tensor, documents: Documents, learned: int) -> Tensor:
        """Run the frozen model once, every layer learning from each document on its own."""
        by_layer = dict(self.gates.items())
        parts: list[Tensor] = []

        def handler(call: AttentionCall) -> Tensor:
            gate, outs, start = by_layer[call.layer], [], 0
            for length, counts in documents:
                s = slice(start, start + length)
                q, k, v = (x[:, :, s] for x in (call.q, call.k, call.v))
                start += length
                out, target = _with_target(gate, q, k, v, call)
                outs.append(out)
                if not counts:
                    continue
                weight = call.q.shape[0] * length / learned
                q, k = call.q_nope[:, :, s], call.k_nope[:, :, s]
                # The layers' mean is reported; gradients are those of the sum over layers.
                values, _ = learn(gate, q, k, target, self.objective, weight, self.config.recall_density)
                parts.append(values / len(by_layer))
            return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

        self._decode(tokens, [length for length, _ in documents], handler)
        if not parts:
            return torch.zeros(2, device=self.gates_device)
        return torch.stack(parts).sum(0)

    @property
    def gates_device(self) -> torch.device:
        """Device of the gates."""
        return next(self.gates.parameters()).device

    def _decode(self, tokens: Tensor, lengths: list[int], handler: Callable[[AttentionCall], Tensor]) -> None:
        """Run the decoder, without the head; positions restart at each document."""
        device = self.gates_device
        more = packed_arguments(self.model, lengths, device)
        with torch.no_grad(), intercept(self.model, handler):
            self.decoder(tokens.to(device), use_cache=False, **more)

    def _all_reduce(self, values: Tensor) -> Tensor:
        """Sum gradients and values over processes in one message; return loss, recall, gradient norm."""
        parameters = list(self.gates.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        if self.accelerator.num_processes > 1:
            flat = torch.cat([*(g.flatten().float() for g in gradients), values.float()])
            flat = self.accelerator.reduce(flat, "sum")
            assert isinstance(flat, Tensor)
            *summed, values = flat.split([*(g.numel() for g in gradients), 2])
            for gradient, total in zip(gradients, summed, strict=True):
                gradient.copy_(total.view_as(gradient))
        norm = torch.nn.utils.get_total_norm(gradients)
        return torch.cat([values.float(), norm[None].float()])

    def _measure(self) -> float:
        """Measure recall on the held-out text and keep the gates if it is the best yet."""
        recall = self.heldout_recall((self.config.recall_density,))[0]
        if recall > self.best:
            self.best, self.stale = recall, 0
            self._kept = {k: v.detach().clone() for k, v in self.gates.state_dict().items()}
        else:
            self.stale += 1
        return recall

    def heldout_recall(self, densities: tuple[float, ...]) -> list[float]:
        """Return recall at each density, the mean over layers and the held-out sequences."""
        by_layer = dict(self.gates.items())
        found: list[Tensor] = []

        def look(call: AttentionCall) -> Tensor:
            gate, length = by_layer[call.layer], call.q.shape[2]
            out, target = _with_target(gate, call.q, call.k, call.v, call)
            scores = gate_scores(gate, call.q_nope, call.k_nope, call.positions)
            found.append(sampled_recall(target, scores, gate.block_size, length, densities))
            return out

        for tokens in self.heldout:
            self._decode(torch.from_numpy(np.asarray(tokens, np.int64))[None], [len(tokens)], look)
        mean = torch.stack(found).mean(0)
        # Every process measured the same text; one answer for all keeps them in step.
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean, "mean")
            assert isinstance(mean, Tensor)
        return mean.tolist()

    def _settings(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "gate": json.loads(json.dumps(self.gates.config.to_dict())),
            "base": self.gates.base.fingerprint,
        }

    def _write_about(self, out: Path, **more: Any) -> None:
        """Write what ran and the checksums of the base model's weights."""
        about = {"sharded": self.sharded, "base_checksum_before": self._checksum}
        self._write_run(out, base_model=self.gates.base.to_dict(), **about, **more)

    def _check_base(self, out: Path) -> None:
        after = base_checksum(self.model)
        self._write_about(out, base_checksum_after=after)
        if after != self._checksum:
            raise RuntimeError(
                "the base model's weights changed during training (checksum "
                f"{self._checksum[:12]} before, {after[:12]} after); these gates belong to no saved model"
            )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        named = dict(self.gates.named_parameters())
        yield from ((f"best.{name}", value) for name, value in self._kept.items())
        yield from ((f"gates.{name}", parameter) for name, parameter in named.items())
        yield from optimizer_tensors(self.optimizer, named)

    def _progress(self) -> dict[str, Any]:
        return {**super()._progress(), "best_recall": self.best, "stale": self.stale}

    def _resume(self, out: Path) -> None:
        """Continue from the checkpoint in ``out``, if there is one."""
        if (found := self._saved(out)) is None:
            return
        state, tensors = found
        named = dict(self.gates.named_parameters())
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[f"gates.{name}"])
        restore_optimizer(self.optimizer, named, tensors)
        self._kept = {
            key.removeprefix("best."): value.to(self.gates_device)
            for key, value in tensors.items()
            if key.startswith("best.")
        }
        self.best, self.stale = state["best_recall"], state["stale"]


def _with_target(
    gate: AttnGate, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Return attention as the model computes it, and the map that the gate should predict."""
    found = pooled_attention(
        q, k, v, gate.block_size, scale=call.scale, softcap=call.softcap, sinks=call.sinks,
        per_kv_head=gate.config.per_kv_head,
    )  # fmt: skip
    return found.out, found.target
