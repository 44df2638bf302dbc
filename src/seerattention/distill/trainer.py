"""The training loop: gates learn inside the frozen model's forward pass, and a killed run continues."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from seerattention.distill import objectives
from seerattention.distill.target import group_target, target_recall
from seerattention.models import AttentionCall, Gates, intercept
from seerattention.ops.pooled_attention import pooled_attention

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


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

    Source: optimizer and schedule, SeerAttention, section 4 (arXiv 2410.13276).
    """

    steps: int = 500
    lr: float = 1e-3
    warmup: float = 0.02
    save_every: int = 50
    recall_density: float = 0.1
    objective: str = "kl"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("save_every", 1)):
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
    """What one step reports.

    Attributes:
        step: Steps done, this one included.
        loss: Mean over layers of the objective.
        recall: Mean over layers of `target_recall`.
        tokens: Tokens read in this step.
        seconds: Time it took.
    """

    step: int
    loss: float
    recall: float
    tokens: int
    seconds: float


class Distiller:
    """Trains the gates of a frozen model; memory does not grow with depth.

    While the model's forward pass goes through a layer, the layer's attention and its pooled map are
    computed in one call, the gate's loss is taken and differentiated at once, and everything but the
    gate's gradients is dropped. No gradient reaches the model.

    Args:
        model: The base model; its weights do not change.
        gates: The gates to train, in place.
        batches: The tokens of a step counted from 0, int64 ``[B, T]`` without padding; the same for
            the same step, so that a resumed run continues exactly.
        config: How to train.
        out: Folder for the checkpoint and ``metrics.jsonl``; None keeps nothing. A checkpoint found
            there is continued.

    Raises:
        ValueError: If the checkpoint is damaged or belongs to another run.
        OSError: If ``out`` cannot be written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Gates,
        batches: Callable[[int], np.ndarray],
        config: DistillConfig | None = None,
        *,
        out: Path | None = None,
    ) -> None:
        self.model = model
        self.gates = gates
        self.batches = batches
        self.config = config or DistillConfig()
        self.objective = objectives.create(self.config.objective)
        self.out = out
        self.done = 0
        gates.use_rotary_of(model)
        # One tensor at a time, without fusing: the same result on every run.
        self.optimizer = torch.optim.AdamW(
            gates.parameters(), lr=self.config.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False
        )
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._resume(out)

    def run(self) -> Iterator[Step]:
        """Train step by step, yielding after each; stopping the iteration in between loses nothing saved.

        Raises:
            FloatingPointError: If the loss is not finite. The gates keep their last good values and the
                last checkpoint stays.
        """
        while self.done < self.config.steps:
            started = time.perf_counter()
            tokens = torch.from_numpy(self.batches(self.done)).to(self.model.device)
            if tokens.numel() == 0:
                raise ValueError(f"the batch of step {self.done} is empty: {list(tokens.shape)}")
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate(self.done)
            self.optimizer.zero_grad(set_to_none=True)
            loss, recall = self._accumulate(tokens)
            self._check_finite(loss)
            self.optimizer.step()
            self.done += 1
            report = Step(self.done, loss, recall, tokens.numel(), time.perf_counter() - started)
            if self.out is not None:
                with (self.out / METRICS).open("a") as log:
                    log.write(json.dumps(asdict(report)) + "\n")
                if self.done % self.config.save_every == 0 or self.done == self.config.steps:
                    self._save(self.out)
            yield report

    def _check_finite(self, loss: float) -> None:
        """Raise before the optimizer spreads a loss or a gradient that is not finite."""
        norm = float(
            torch.nn.utils.get_total_norm(p.grad for p in self.gates.parameters() if p.grad is not None)
        )
        if math.isfinite(loss) and math.isfinite(norm):
            return
        kept = f"; the checkpoint in {self.out} is the last good one" if self.out else ""
        raise FloatingPointError(
            f"step {self.done + 1} has loss {loss} and gradient norm {norm}, the gates were not changed by "
            f"it{kept}; lower the learning rate or look at this step's batch"
        )

    def _accumulate(self, tokens: Tensor) -> tuple[float, float]:
        """Run the frozen model once; leave gradients in the gates and return mean loss and recall."""
        by_layer = dict(self.gates.items())
        losses: list[Tensor] = []
        recalls: list[float] = []

        def learn(call: AttentionCall) -> Tensor:
            if call.softcap is not None or call.sinks is not None:
                raise NotImplementedError(
                    "gates cannot be distilled from attention with a soft-cap or sinks yet: pooled_attention "
                    "computes neither; attach a baseline instead"
                )
            gate = by_layer[call.layer]
            size, length = gate.block_size, call.q.shape[2]
            out, target = pooled_attention(call.q, call.k, call.v, size, scale=call.scale)
            if gate.config.per_kv_head:
                target = group_target(target, gate.config.num_kv_heads)
            with torch.enable_grad():
                scores = gate(call.q_nope.detach(), call.k_nope.detach(), positions=call.positions)
                loss = self.objective(target, scores, size, length)
                loss.backward()
            losses.append(loss.detach())
            recalls.append(target_recall(target, scores.detach(), size, length, self.config.recall_density))
            return out

        with torch.no_grad(), intercept(self.model, learn):
            self.model.get_decoder()(tokens, use_cache=False)
        return float(torch.stack(losses).mean()), sum(recalls) / len(recalls)

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must share with this run, as JSON types."""
        return {
            "config": asdict(self.config),
            "gate": json.loads(json.dumps(self.gates.config.to_dict())),
            "base": self.gates.base.fingerprint,
            "text": hashlib.sha256(self.batches(0).tobytes()).hexdigest()[:16],
        }

    def _save(self, out: Path) -> None:
        """Write gates, optimizer and progress as one file, whole or not at all."""
        tensors = {}
        for name, parameter in self.gates.named_parameters():
            tensors[f"gates.{name}"] = parameter.detach().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value.detach().contiguous()
        state = json.dumps({"step": self.done, **self._identity()})
        temporary = out / f".{CHECKPOINT}"
        try:
            save_file(tensors, temporary, metadata={"state": state})
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(out / CHECKPOINT)
        finally:
            temporary.unlink(missing_ok=True)

    def _resume(self, out: Path) -> None:
        """Continue from the checkpoint in ``out``, if there is one."""
        path = out / CHECKPOINT
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"the checkpoint {path} is truncated or damaged ({error}); delete it to start again"
            ) from error
        mine = self._identity()
        if differing := [key for key in mine if state.get(key) != mine[key]]:
            raise ValueError(
                f"the checkpoint {path} is of another run, {', '.join(differing)} differ; give another "
                "output folder, or delete it to start again"
            )
        with torch.no_grad():
            for name, parameter in self.gates.named_parameters():
                parameter.copy_(tensors[f"gates.{name}"])
                prefix = f"optimizer.{name}."
                self.optimizer.state[parameter] = {
                    key.removeprefix(prefix): value if key.endswith(".step") else value.to(parameter.device)
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
        self.done = state["step"]
        self._trim_metrics(out)

    def _trim_metrics(self, out: Path) -> None:
        """Drop the metrics of steps that came after the checkpoint: they will be written again."""
        path = out / METRICS
        if path.exists():
            lines = [ln for ln in path.read_text().splitlines(keepends=True) if ln.endswith("\n")]
            kept = [ln for ln in lines if json.loads(ln)["step"] <= self.done]
            temporary = out / f".{METRICS}"
            temporary.write_text("".join(kept))
            temporary.replace(path)
