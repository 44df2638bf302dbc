"""The training loop: gates learn inside the frozen model's forward pass, and a killed run continues."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from seerattention.distill import objectives
from seerattention.distill._checkpoint import read_checkpoint, trim_metrics, write_whole
from seerattention.distill.data import Packed
from seerattention.distill.layer import gate_scores, learn, sampled_recall
from seerattention.gate import AttnGate
from seerattention.models import AttentionCall, Gates, base_checksum, intercept
from seerattention.ops.pooled_attention import pooled_attention

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
RUN = "run.json"

#: A document of fewer blocks teaches nothing: a gate chooses among too few.
LEAST_BLOCKS = 4

#: The tokens of a step: int64 ``[B, T]`` of one document each, or packs of several.
Batch = np.ndarray | Packed


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

    Source: optimizer and schedule, SeerAttention, section 4 (arXiv 2410.13276).
    """

    steps: int = 500
    lr: float = 1e-3
    warmup: float = 0.02
    save_every: int = 50
    recall_density: float = 0.1
    objective: str = "kl"
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
        warmup = math.ceil(self.warmup * self.steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


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


class Distiller:
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
    ) -> None:
        self.model = model
        self.gates = gates
        self.batches = batches
        self.config = config or DistillConfig()
        self.objective = objectives.create(self.config.objective)
        self.out = out
        self.heldout = heldout
        self.accelerator = accelerator or make_accelerator(model.device.type)
        self.sharded = bool(self.accelerator.is_fsdp2) if shard is None else shard
        self.done = 0
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
            self._write_run(out)
        if self.sharded:
            shard_layers(model, self.accelerator)

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
        board = self._board()
        while not self.finished:
            report = self._step()
            if self.out is not None:
                if self.accelerator.is_main_process:
                    with (self.out / METRICS).open("a") as log:
                        log.write(json.dumps(asdict(report)) + "\n")
                    _to_board(board, report)
                if self.done % self.config.save_every == 0 or self.finished:
                    self._save(self.out)
            yield report
        if board is not None:
            board.close()
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
        rows = _documents(batch, LEAST_BLOCKS * self.gates.config.block_size)
        learned = sum(length for row in rows for length, counts in row if counts)
        if not learned:
            raise ValueError(
                f"the batch of step {self.done} is empty or has no document of {LEAST_BLOCKS} blocks "
                f"({LEAST_BLOCKS * self.gates.config.block_size} tokens)"
            )
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = world * self.config.grad_accum
        if len(rows) % parts:
            raise ValueError(
                f"{len(rows)} sequences per step cannot be split evenly over {world} processes x grad_accum "
                f"{self.config.grad_accum}; give a multiple of {parts}"
            )
        tokens = torch.from_numpy(np.ascontiguousarray(batch.tokens if isinstance(batch, Packed) else batch))
        each = len(rows) // parts
        # Packs differ in their documents, so they go one at a time.
        size = 1 if isinstance(batch, Packed) else each
        start, stop = rank * each * self.config.grad_accum, (rank + 1) * each * self.config.grad_accum
        totals = [self._forward(tokens[s : s + size], rows[s], learned) for s in range(start, stop, size)]
        return torch.stack(totals).sum(0)

    def _forward(self, tokens: Tensor, documents: list[tuple[int, bool]], learned: int) -> Tensor:
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
                values = learn(gate, q, k, target, self.objective, weight, self.config.recall_density)
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
        more: dict[str, Any] = {}
        device = self.gates_device
        if len(lengths) > 1:
            _refuse_windows(self.model)
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            more = {
                "position_ids": positions.to(device),
                "attention_mask": torch.ones(1, len(positions[0]), dtype=torch.long, device=device),
            }
        with torch.no_grad(), intercept(self.model, handler):
            self.model.get_decoder()(tokens.to(device), use_cache=False, **more)

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

    def _board(self) -> Any:
        if self.out is None or not self.accelerator.is_main_process:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=self.done + 1)

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share with this run, as JSON types."""
        first = self.batches(0)
        digest = hashlib.sha256((first.tokens if isinstance(first, Packed) else first).tobytes())
        if isinstance(first, Packed):
            digest.update(json.dumps(first.lengths).encode())
        return {
            "config": asdict(self.config),
            "gate": json.loads(json.dumps(self.gates.config.to_dict())),
            "base": self.gates.base.fingerprint,
            "text": digest.hexdigest()[:16],
        }

    def _write_run(self, out: Path, **more: Any) -> None:
        """Write what ran and the checksums of the base model's weights."""
        if not self.accelerator.is_main_process:
            return
        report = {
            "base": self.gates.base.to_dict(),
            **self._identity(),
            "processes": self.accelerator.num_processes,
            "sharded": self.sharded,
            "base_checksum_before": self._checksum,
            **more,
        }
        write_whole(out / RUN, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))

    def _check_base(self, out: Path) -> None:
        after = base_checksum(self.model)
        self._write_run(out, base_checksum_after=after)
        if after != self._checksum:
            raise RuntimeError(
                "the base model's weights changed during training (checksum "
                f"{self._checksum[:12]} before, {after[:12]} after); these gates belong to no saved model"
            )

    def _save(self, out: Path) -> None:
        """Write gates, optimizer and progress as one file, whole or not at all."""
        if self.accelerator.is_main_process:
            tensors = {f"best.{name}": value.contiguous() for name, value in self._kept.items()}
            for name, parameter in self.gates.named_parameters():
                tensors[f"gates.{name}"] = parameter.detach().contiguous()
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer.{name}.{key}"] = value.detach().contiguous()
            progress = {"step": self.done, "best_recall": self.best, "stale": self.stale}
            state = json.dumps({**progress, **self._identity()})
            write_whole(out / CHECKPOINT, lambda path: save_file(tensors, path, metadata={"state": state}))
        self.accelerator.wait_for_everyone()

    def _resume(self, out: Path) -> None:
        """Continue from the checkpoint in ``out``, if there is one."""
        if not (out / CHECKPOINT).exists():
            return
        state, tensors = read_checkpoint(out / CHECKPOINT, self._identity())
        with torch.no_grad():
            for name, parameter in self.gates.named_parameters():
                parameter.copy_(tensors[f"gates.{name}"])
                prefix = f"optimizer.{name}."
                self.optimizer.state[parameter] = {
                    key.removeprefix(prefix): value if key.endswith(".step") else value.to(parameter.device)
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
        self._kept = {
            key.removeprefix("best."): value.to(self.gates_device)
            for key, value in tensors.items()
            if key.startswith("best.")
        }
        self.done, self.best, self.stale = state["step"], state["best_recall"], state["stale"]
        if self.accelerator.is_main_process:
            trim_metrics(out / METRICS, self.done)


def make_accelerator(device_type: str) -> Accelerator:
    """Return Accelerate's view of the processes that a launcher started, for models on this device.

    Its state is one per process and refuses a CPU after a GPU; a single process needs no such choice.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(cpu=several and device_type == "cpu")


def shard_layers(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shard a frozen model over the processes, a unit per layer, as Accelerate's FSDP2 plugin says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if accelerator.num_processes < 2:
        raise ValueError("there is one process, nothing to shard over; start several by accelerate launch")
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    model.requires_grad_(False)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": plugin is None or bool(plugin.reshard_after_forward),
    }
    decoder = model.get_decoder()
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(decoder, **settings)


def _documents(batch: Batch, least: int) -> list[list[tuple[int, bool]]]:
    """Return of every row its documents: length, and whether it is long enough to learn from."""
    if isinstance(batch, Packed):
        return [[(n, n >= least) for n in row] for row in batch.lengths]
    if batch.ndim != 2 or not batch.size:
        raise ValueError(f"a batch must be [B, T] and not empty, got {list(batch.shape)}")
    return [[(batch.shape[1], True)]] * len(batch)


def _with_target(
    gate: AttnGate, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Return attention as the model computes it, and the map that the gate should predict."""
    return pooled_attention(
        q, k, v, gate.block_size, scale=call.scale, softcap=call.softcap, sinks=call.sinks,
        per_kv_head=gate.config.per_kv_head,
    )  # fmt: skip


def _refuse_windows(model: PreTrainedModel) -> None:
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if any(kind != "full_attention" for kind in kinds):
        raise NotImplementedError(
            "documents cannot be packed for a model with sliding-window layers: a window would reach into "
            "the document before; train on single windows of text instead (packing off)"
        )


def _to_board(board: Any, report: Step) -> None:
    if board is None:
        return
    for name in ("loss", "recall", "seconds", "heldout_recall"):
        if (value := getattr(report, name)) is not None:
            board.add_scalar(name, value, report.step)
